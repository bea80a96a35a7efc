//! A part of a file as the body of a response.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use tokio::task::JoinHandle;

/// Bytes to read at once: enough that a switch to a thread that may block
/// costs little, and not much memory for a slow client to hold.
const BLOCK: u64 = 256 << 10;

/// Bytes of an open file that are to be sent.
#[derive(Debug)]
pub struct FilePart {
    file: Arc<File>,
    offset: u64,
    left: u64,
    reading: Option<JoinHandle<io::Result<Vec<u8>>>>,
}

impl FilePart {
    /// The `length` bytes at `offset` of the `size` ones that start at `start`
    /// in `file`; none if there are fewer.
    pub fn new(file: File, start: u64, size: u64, offset: u64, length: u64) -> Option<FilePart> {
        offset.checked_add(length).filter(|end| *end <= size)?;
        let offset = start.checked_add(offset)?;
        Some(FilePart { file: Arc::new(file), offset, left: length, reading: None })
    }

    /// How many bytes are still to come.
    pub fn left(&self) -> u64 {
        self.left
    }

    /// The next bytes, or none at the end.
    ///
    /// # Errors
    ///
    /// If the file can not be read, or has become shorter.
    pub fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<io::Result<Bytes>>> {
        if self.left == 0 {
            return Poll::Ready(None);
        }
        let reading = self.reading.get_or_insert_with(|| {
            let (file, offset, length) = (Arc::clone(&self.file), self.offset, self.left.min(BLOCK));
            tokio::task::spawn_blocking(move || {
                #[expect(clippy::cast_possible_truncation, reason = "at most a block")]
                let mut block = vec![0; length as usize];
                file.read_exact_at(&mut block, offset)?;
                Ok(block)
            })
        });
        let read = ready!(Pin::new(reading).poll(context));
        self.reading = None;
        let block = read.unwrap_or_else(|panic| Err(io::Error::other(panic)));
        if let Ok(block) = &block {
            self.offset += block.len() as u64;
            self.left -= block.len() as u64;
        }
        Poll::Ready(Some(block.map(Bytes::from)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;
    use std::io::Write as _;

    async fn read(mut part: FilePart) -> io::Result<Vec<u8>> {
        let mut all = Vec::new();
        while let Some(block) = poll_fn(|context| part.poll_next(context)).await {
            all.extend_from_slice(&block?);
        }
        assert_eq!(part.left(), 0);
        Ok(all)
    }

    #[tokio::test]
    async fn a_part_is_read_in_blocks() {
        let mut file = tempfile::tempfile().unwrap();
        let content: Vec<u8> = (0..BLOCK * 3).map(|index| (index % 251) as u8).collect();
        file.write_all(b"before ").unwrap();
        file.write_all(&content).unwrap();
        let part = |offset, length| FilePart::new(file.try_clone().unwrap(), 7, BLOCK * 3, offset, length);
        for (offset, length) in [(0, BLOCK * 3), (1, BLOCK * 2), (BLOCK * 3, 0), (5, 10)] {
            let expected = &content[offset as usize..(offset + length) as usize];
            assert!(read(part(offset, length).unwrap()).await.unwrap() == expected);
        }
        for (offset, length) in [(0, BLOCK * 3 + 1), (BLOCK * 3 + 1, 0), (u64::MAX, 2)] {
            assert!(part(offset, length).is_none());
        }
    }

    #[tokio::test]
    async fn a_file_that_becomes_shorter_is_an_error() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"0123456789").unwrap();
        let part = FilePart::new(file.try_clone().unwrap(), 0, 10, 0, 10).unwrap();
        file.set_len(5).unwrap();
        assert!(read(part).await.is_err());
    }
}
