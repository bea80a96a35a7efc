//! One connection, from its first byte to its last.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use http::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use crate::early_hints;
use crate::environ::Connection;
use crate::handler;
use crate::listener::Stream;
use crate::tenants::Tenants;

/// Bytes of a request's head that hyper buffers, and of a response before it
/// writes. Its least is 8 KiB.
const CONNECTION_BUFFER: usize = 64 << 10;

/// What every connection needs.
pub struct Server {
    /// The tenants that answer.
    pub tenants: Arc<Tenants>,
    /// Time in which the head of a request must come.
    pub header_timeout: Duration,
    /// Time in which a client must take something of a response.
    pub client_idle: Duration,
    /// One permit per open connection.
    pub connections: Arc<Semaphore>,
}

/// Speaks HTTP on one connection.
pub async fn converse(
    server: Arc<Server>,
    stream: Box<dyn Stream>,
    connection: Connection,
    _permit: OwnedSemaphorePermit,
    mut stopping: watch::Receiver<bool>,
) {
    let connection = Arc::new(connection);
    let (stream, hints) = early_hints::layer(TimedWrites::new(stream, server.client_idle));
    let service = service_fn(|mut request: Request<Incoming>| {
        request.extensions_mut().insert(hints.clone());
        handler::handle(Arc::clone(&server.tenants), Arc::clone(&connection), request)
    });
    let stream = TokioIo::new(stream);
    let conversation = http1::Builder::new()
        // Without a timer hyper ignores the timeout.
        .timer(TokioTimer::new())
        .header_read_timeout(server.header_timeout)
        // As apps write them and older clients expect them; hyper keeps no
        // spelling of ours.
        .title_case_headers(true)
        // Not `pipeline_flush`: with it hyper buffers bodies without a bound.
        .max_buf_size(CONNECTION_BUFFER)
        .serve_connection(stream, service);
    let mut conversation = std::pin::pin!(conversation);
    let result = tokio::select! {
        result = conversation.as_mut() => result,
        _ = stopping.changed() => {
            // Ends after the response that is under way, or now if there is none.
            conversation.as_mut().graceful_shutdown();
            conversation.await
        }
    };
    if let Err(error) = result {
        tracing::debug!(peer = ?connection.peer, "connection ended: {error}");
    }
}

/// A stream whose writes fail if the other end takes nothing for too long.
/// hyper has no such limit; a client that never reads would hold its
/// connection, and the instance behind it, for ever.
struct TimedWrites {
    stream: Box<dyn Stream>,
    limit: Duration,
    waiting: Option<Pin<Box<tokio::time::Sleep>>>,
}

impl TimedWrites {
    fn new(stream: Box<dyn Stream>, limit: Duration) -> TimedWrites {
        TimedWrites { stream, limit, waiting: None }
    }

    fn within_limit<T>(
        &mut self,
        context: &mut Context<'_>,
        polled: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if polled.is_ready() {
            self.waiting = None;
            return polled;
        }
        let limit = self.limit;
        let waiting = self.waiting.get_or_insert_with(|| Box::pin(tokio::time::sleep(limit)));
        ready!(waiting.as_mut().poll(context));
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client takes no data")))
    }
}

impl AsyncRead for TimedWrites {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for TimedWrites {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.within_limit(context, polled)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write_vectored(context, buffers);
        self.within_limit(context, polled)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.stream).poll_flush(context);
        self.within_limit(context, polled)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.stream).poll_shutdown(context);
        self.within_limit(context, polled)
    }
}
