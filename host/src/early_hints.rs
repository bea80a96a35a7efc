//! `103 Early Hints` (RFC 8297) on HTTP/1.1.
//!
//! hyper refuses 1xx responses from a service, which returns one response
//! only. So interim responses go past it, straight to the connection's stream.
//! They must not get between the bytes of another message. That holds because
//! hyper flushes its stream only once it has handed over all it had, and
//! because [`EarlyHints::send`] waits until its bytes are written: as long as
//! it waits, there is no final response that hyper could have begun.
//! The guest may be at work elsewhere than in the connection's task, which is
//! therefore woken to flush its stream.
//!
//! A connection that speaks HTTP/2 must not have this layer.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use atomic_waker::AtomicWaker;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::oneshot;

/// The way to send interim responses on one connection.
#[derive(Clone, Debug)]
pub struct EarlyHints(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// The connection's task.
    task: AtomicWaker,
}

#[derive(Debug)]
enum State {
    /// Nothing to send.
    Idle,
    /// An interim response that is not out yet.
    Waiting(Interim),
    /// The connection is closed.
    Closed,
}

#[derive(Debug)]
struct Interim {
    bytes: Vec<u8>,
    written: usize,
    /// Told when all is written; closed if nobody waits for it any more.
    done: oneshot::Sender<()>,
}

/// The connection is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Closed;

impl EarlyHints {
    /// Sends an interim response with `fields`, checked header lines, and
    /// waits until it is written. Only for a request that hyper has no
    /// response to yet.
    ///
    /// # Errors
    ///
    /// [`Closed`] if it could not be sent.
    pub async fn send(&self, fields: &[u8]) -> Result<(), Closed> {
        let bytes = [b"HTTP/1.1 103 Early Hints\r\n", fields, b"\r\n"].concat();
        let (done, written) = oneshot::channel();
        {
            let mut state = self.lock();
            if matches!(*state, State::Closed) {
                return Err(Closed);
            }
            *state = State::Waiting(Interim { bytes, written: 0, done });
        }
        // It flushes its stream when it has nothing else to do.
        self.0.task.wake();
        written.await.map_err(|_| Closed)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A stream on which interim responses can be sent.
#[derive(Debug)]
pub struct Stream<S> {
    inner: S,
    hints: EarlyHints,
}

/// Makes `inner` a stream on which interim responses can be sent.
pub fn layer<S>(inner: S) -> (Stream<S>, EarlyHints) {
    let shared = Shared { state: Mutex::new(State::Idle), task: AtomicWaker::new() };
    let hints = EarlyHints(Arc::new(shared));
    (Stream { inner, hints: hints.clone() }, hints)
}

impl<S: AsyncWrite + Unpin> Stream<S> {
    /// Writes the interim response that waits; if `begun`, only one that is
    /// half way out.
    fn poll_interim(&mut self, context: &mut Context<'_>, begun: bool) -> Poll<io::Result<()>> {
        let mut state = self.hints.lock();
        let State::Waiting(interim) = &mut *state else {
            return Poll::Ready(Ok(()));
        };
        if interim.written == 0 {
            if interim.done.is_closed() {
                *state = State::Idle;
                return Poll::Ready(Ok(()));
            }
            if begun {
                return Poll::Ready(Ok(()));
            }
        }
        while interim.written < interim.bytes.len() {
            let rest = &interim.bytes[interim.written..];
            match ready!(Pin::new(&mut self.inner).poll_write(context, rest))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                written => interim.written += written,
            }
        }
        if let State::Waiting(interim) = std::mem::replace(&mut *state, State::Idle) {
            // Nobody waits any more if the request has failed since.
            let _ = interim.done.send(());
        }
        Poll::Ready(Ok(()))
    }
}

impl<S> Drop for Stream<S> {
    fn drop(&mut self) {
        *self.hints.lock() = State::Closed;
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Stream<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        // hyper always reads while a request is at work, to see its client leave.
        self.hints.0.task.register(context.waker());
        Pin::new(&mut self.inner).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Stream<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_interim(context, true))?;
        Pin::new(&mut self.inner).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_interim(context, true))?;
        Pin::new(&mut self.inner).poll_write_vectored(context, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        // hyper has nothing left to write: this is between two messages, or
        // there is no interim response.
        ready!(self.poll_interim(context, false))?;
        Pin::new(&mut self.inner).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::Future;
    use std::pin::pin;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    const INTERIM: &[u8] = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n";

    fn poll<F: Future>(future: Pin<&mut F>) -> Poll<F::Output> {
        future.poll(&mut Context::from_waker(std::task::Waker::noop()))
    }

    #[tokio::test]
    async fn an_interim_response_goes_out_with_the_flush() {
        let (ours, mut theirs) = tokio::io::duplex(1024);
        let (mut stream, hints) = layer(ours);
        let mut sending = pin!(hints.send(b"Link: </a>\r\n"));
        assert!(poll(sending.as_mut()).is_pending());
        // The end of an earlier response that was still in hyper's buffer.
        stream.write_all(b"earlier").await.unwrap();
        stream.flush().await.unwrap();
        assert_eq!(poll(sending.as_mut()), Poll::Ready(Ok(())));
        stream.write_all(b"final").await.unwrap();
        drop(stream);
        let mut seen = Vec::new();
        theirs.read_to_end(&mut seen).await.unwrap();
        assert_eq!(seen, [b"earlier", INTERIM, b"final"].concat());
        assert_eq!(hints.send(b"").await, Err(Closed));
    }

    #[tokio::test]
    async fn one_that_is_half_way_out_is_completed_before_anything_else() {
        let (ours, mut theirs) = tokio::io::duplex(10);
        let (mut stream, hints) = layer(ours);
        {
            let mut sending = pin!(hints.send(b"Link: </a>\r\n"));
            assert!(poll(sending.as_mut()).is_pending());
            assert!(poll(pin!(stream.flush())).is_pending());
        }
        let reader = tokio::spawn(async move {
            let mut seen = Vec::new();
            theirs.read_to_end(&mut seen).await.unwrap();
            seen
        });
        stream.write_all(b"final").await.unwrap();
        drop(stream);
        assert_eq!(reader.await.unwrap(), [INTERIM, b"final"].concat());
    }

    #[tokio::test]
    async fn the_task_of_the_connection_is_woken_for_it() {
        let (ours, mut theirs) = tokio::io::duplex(1024);
        let (mut stream, hints) = layer(ours);
        let connection = tokio::spawn(async move {
            std::future::poll_fn(|context| {
                let mut buffer = [0];
                let read = Pin::new(&mut stream).poll_read(context, &mut ReadBuf::new(&mut buffer));
                assert!(Pin::new(&mut stream).poll_flush(context).is_ready());
                read
            })
            .await
        });
        tokio::task::yield_now().await;
        hints.send(b"Link: </a>\r\n").await.unwrap();
        let mut seen = [0; INTERIM.len()];
        theirs.read_exact(&mut seen).await.unwrap();
        assert_eq!(seen, INTERIM);
        drop(theirs);
        connection.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn one_that_nobody_waits_for_is_dropped() {
        let (ours, mut theirs) = tokio::io::duplex(1024);
        let (mut stream, hints) = layer(ours);
        assert!(poll(pin!(hints.send(b""))).is_pending());
        stream.flush().await.unwrap();
        stream.write_all(b"final").await.unwrap();
        drop(stream);
        let mut seen = String::new();
        theirs.read_to_string(&mut seen).await.unwrap();
        assert_eq!(seen, "final");
    }
}
