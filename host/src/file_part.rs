//! A part of a file as the body of a response.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use tokio::sync::OwnedSemaphorePermit;

use crate::disk::{self, Work};
use crate::files::granted::OpenFile;
use crate::footprint::Footprint;

/// Bytes to read at once: enough that a switch to a thread that may block
/// costs little, and not much memory for a slow client to hold.
const BLOCK: u64 = 256 << 10;

/// A file that is to be sent, with all that it holds as long as it is open.
#[derive(Debug)]
pub struct FileToSend {
    source: Source,
    /// Where its content starts.
    start: u64,
    size: u64,
    /// Its tenant's.
    footprint: Arc<Footprint>,
    _place: OwnedSemaphorePermit,
}

/// What a file is read from.
#[derive(Debug)]
pub enum Source {
    /// A file that others may read from too.
    Shared(Arc<File>),
    /// A file in `/data`. It counts for the quota, also without a name, and its
    /// descriptor for the grant.
    Granted(OpenFile),
}

impl FileToSend {
    /// The `size` bytes from `start` of `source`, in this place of its tenant.
    pub fn new(
        source: Source,
        (start, size): (u64, u64),
        footprint: &Arc<Footprint>,
        place: OwnedSemaphorePermit,
    ) -> FileToSend {
        FileToSend { source, start, size, footprint: Arc::clone(footprint), _place: place }
    }

    fn file(&self) -> &File {
        match &self.source {
            Source::Shared(file) => file,
            Source::Granted(file) => file.file(),
        }
    }
}

/// Bytes of an open file that are to be sent.
#[derive(Debug)]
pub struct FilePart {
    file: Arc<FileToSend>,
    offset: u64,
    left: u64,
    reading: Option<Work<io::Result<Bytes>>>,
}

impl FilePart {
    /// The `length` bytes at `offset` of `file`; none if there are fewer.
    pub fn new(file: FileToSend, offset: u64, length: u64) -> Option<FilePart> {
        offset.checked_add(length).filter(|end| *end <= file.size)?;
        let offset = file.start.checked_add(offset)?;
        Some(FilePart { file: Arc::new(file), offset, left: length, reading: None })
    }

    /// What its tenant holds.
    pub fn footprint(&self) -> &Arc<Footprint> {
        &self.file.footprint
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
            // Also while it waits to be read, and until the client has it.
            let held = self.file.footprint.hold(length);
            disk::begin(&self.file.footprint, move || {
                #[expect(clippy::cast_possible_truncation, reason = "at most a block")]
                let mut block = vec![0; length as usize];
                file.file().read_exact_at(&mut block, offset)?;
                Ok(held.tie(block))
            })
        });
        let read = ready!(Pin::new(reading).poll(context));
        self.reading = None;
        let block = read.unwrap_or_else(|| Err(io::Error::other("the read was not done")));
        if let Ok(block) = &block {
            self.offset += block.len() as u64;
            self.left -= block.len() as u64;
        }
        Poll::Ready(Some(block))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;
    use std::io::Write as _;

    fn to_send(file: &File, start: u64, size: u64, footprint: &Arc<Footprint>) -> FileToSend {
        let source = Source::Shared(Arc::new(file.try_clone().unwrap()));
        FileToSend::new(source, (start, size), footprint, footprint.file_place().unwrap())
    }

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
        let footprint = Footprint::new(None);
        let part = |offset, length| FilePart::new(to_send(&file, 7, BLOCK * 3, &footprint), offset, length);
        for (offset, length) in [(0, BLOCK * 3), (1, BLOCK * 2), (BLOCK * 3, 0), (5, 10)] {
            let expected = &content[offset as usize..(offset + length) as usize];
            assert!(read(part(offset, length).unwrap()).await.unwrap() == expected);
        }
        for (offset, length) in [(0, BLOCK * 3 + 1), (BLOCK * 3 + 1, 0), (u64::MAX, 2)] {
            assert!(part(offset, length).is_none());
        }
        // A block is held until its last byte is sent, and its place until the end.
        let mut part = part(0, BLOCK * 3).unwrap();
        let block = poll_fn(|context| part.poll_next(context)).await.unwrap().unwrap();
        let piece = block.slice(..10);
        drop(block);
        assert_eq!(footprint.held(), BLOCK);
        let places: Vec<_> = std::iter::from_fn(|| footprint.file_place()).collect();
        assert!(places.len() > 100);
        drop((part, piece));
        assert!(footprint.file_place().is_some());
        assert_eq!(footprint.held(), 0);
    }

    #[tokio::test]
    async fn a_file_that_becomes_shorter_is_an_error() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"0123456789").unwrap();
        let part = FilePart::new(to_send(&file, 0, 10, &Footprint::new(None)), 0, 10).unwrap();
        file.set_len(5).unwrap();
        assert!(read(part).await.is_err());
    }
}
