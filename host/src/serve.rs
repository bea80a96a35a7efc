//! The `serve` command: load the app, bind, accept, and drain on a signal.
//!
//! Everything that can be wrong is found before the first socket is bound.

use std::future::Future;
use std::io;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use anyhow::{Context as _, Result};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use crate::app::{self, LoadedApp};
use crate::cache::Cache;
use crate::cli::ServeArgs;
use crate::engine::{self, EpochTicker};
use crate::environ::Connection;
use crate::error::UserError;
use crate::handler::{self, App, RequestLimits};
use crate::pool::{Pool, PoolSettings};
use crate::sandbox::{self, Paths};

/// Bytes of a request's head that hyper buffers, and of a response before it
/// writes. Its least is 8 KiB.
const CONNECTION_BUFFER: usize = 64 << 10;

/// Runs the server until a signal ends it.
///
/// # Errors
///
/// A [`UserError`] if the app or an option is not usable, else what failed.
pub fn run(args: &ServeArgs) -> Result<()> {
    let addresses = args.bind.iter().map(|text| Address::parse(text)).collect::<Result<Vec<_>>>()?;
    let settings = PoolSettings {
        instances: usize::from(args.instances),
        queue: args.queue as usize,
        queue_wait: args.queue_wait.0,
        isolation: args.isolation,
        max_requests: args.max_requests,
    };
    let engine = engine::runner(u32::try_from(settings.capacity()).unwrap_or(u32::MAX))
        .map_err(anyhow::Error::from)
        .context("failed to reserve memory for the instances")?;
    let LoadedApp { program, grants } = app::load(&engine, &args.app, &args.project, &args.grants)?;
    // Before the first thread: not all of it reaches those that run already.
    sandbox::apply(args.sandbox, &paths_in_use(&addresses, args.grants.data.as_deref())?)?;
    let _ticker = EpochTicker::start(&engine).context("failed to start the epoch thread")?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("failed to start the runtime")?;
    let served = runtime.block_on(async {
        let pool = Pool::new(program, grants, settings);
        pool.warm().await.map_err(|error| app::refuse_start(pool.name(), args.grants.memory, error))?;
        let limits = RequestLimits {
            body: args.max_body.0,
            timeout: args.timeout.0,
            client_idle: args.client_timeout.0,
        };
        let server = Server {
            app: Arc::new(App { pool, limits }),
            header_timeout: args.header_timeout.0,
            client_idle: args.client_timeout.0,
            connections: Arc::new(Semaphore::new(args.max_connections as usize)),
        };
        serve(server, &addresses, args.grace.0).await
    });
    // Whatever is left had its grace.
    runtime.shutdown_timeout(Duration::from_millis(100));
    served
}

/// The paths that the server uses once its app is loaded.
fn paths_in_use(addresses: &[Address], data: Option<&Path>) -> Result<Paths> {
    let mut write = vec![Cache::open()?.root().to_path_buf()];
    write.extend(data.map(Path::to_path_buf));
    write.extend(addresses.iter().filter_map(|address| match address {
        Address::Unix(path) => path.parent().map(|parent| {
            if parent.as_os_str().is_empty() { PathBuf::from(".") } else { parent.to_path_buf() }
        }),
        Address::Tcp(_) => None,
    }));
    Ok(Paths { read: Vec::new(), write })
}

/// What every connection needs.
struct Server {
    app: Arc<App>,
    header_timeout: Duration,
    client_idle: Duration,
    /// One permit per open connection.
    connections: Arc<Semaphore>,
}

async fn serve(server: Server, addresses: &[Address], grace: Duration) -> Result<()> {
    let mut listeners = Vec::new();
    for address in addresses {
        listeners.push(address.listen().await?);
    }
    let mut terminate = signal(SignalKind::terminate()).context("failed to watch for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("failed to watch for SIGINT")?;
    for listener in &listeners {
        announce(&format!("listening on {}", listener.url()));
    }
    let server = Arc::new(server);
    let (stop, stopping) = watch::channel(false);
    let accepting: Vec<_> = listeners
        .into_iter()
        .map(|listener| tokio::spawn(accept(Arc::clone(&server), listener, stopping.clone())))
        .collect();
    drop(stopping);

    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("stopping: finishing what is running");
    // The receivers are gone only if every task has ended already.
    let _ = stop.send(true);
    for task in accepting {
        // Drops the listener, so that no new connection is taken.
        let _ = task.await;
    }
    tokio::select! {
        // Each connection holds a receiver until it is closed. Then only
        // guests that clean up after a client that left are still at work.
        () = async { stop.closed().await; server.app.pool.drained().await } => Ok(()),
        () = tokio::time::sleep(grace) => {
            let open = stop.receiver_count();
            tracing::warn!("{open} connections were still open after the grace time and are cut");
            Ok(())
        }
        _ = terminate.recv() => { tracing::warn!("second signal: stopping at once"); Ok(()) }
        _ = interrupt.recv() => { tracing::warn!("second signal: stopping at once"); Ok(()) }
    }
}

/// The line that says where we listen: the one thing on standard output.
#[expect(clippy::print_stdout, reason = "a program that starts us reads the port from here")]
fn announce(line: &str) {
    println!("{line}");
}

/// Takes connections until told to stop.
async fn accept(server: Arc<Server>, listener: Listener, mut stopping: watch::Receiver<bool>) {
    loop {
        // Waiting for a free place first leaves further clients in the
        // kernel's queue, where they cost us nothing.
        let accepted = tokio::select! {
            accepted = async {
                let permit = Arc::clone(&server.connections).acquire_owned().await;
                (permit, listener.accept().await)
            } => accepted,
            _ = stopping.changed() => return,
        };
        match accepted {
            (Ok(permit), Ok((stream, connection))) => {
                tokio::spawn(converse(Arc::clone(&server), stream, connection, permit, stopping.clone()));
            }
            (_, Err(error)) => {
                // EMFILE and its like last a while; an aborted connection does
                // not, but a short rest hurts nobody.
                tracing::warn!("failed to accept a connection: {error}");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            (Err(_), _) => return,
        }
    }
}

/// Speaks HTTP on one connection.
async fn converse(
    server: Arc<Server>,
    stream: Box<dyn Stream>,
    connection: Connection,
    _permit: OwnedSemaphorePermit,
    mut stopping: watch::Receiver<bool>,
) {
    let connection = Arc::new(connection);
    let service =
        service_fn(|request| handler::handle(Arc::clone(&server.app), Arc::clone(&connection), request));
    let stream = TokioIo::new(TimedWrites::new(stream, server.client_idle));
    let conversation = http1::Builder::new()
        // Without a timer hyper ignores the timeout.
        .timer(TokioTimer::new())
        .header_read_timeout(server.header_timeout)
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

/// An address to listen on.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Address {
    Tcp(String),
    Unix(PathBuf),
}

impl Address {
    fn parse(text: &str) -> Result<Address> {
        let refuse = |reason: &str| {
            UserError::new(format!("can not listen on `{text}`: {reason}"))
                .remedy("write `127.0.0.1:8000`, `[::1]:8000`, `0.0.0.0:0` for any free port, or `unix:PATH`")
        };
        if let Some(path) = text.strip_prefix("unix:") {
            if path.is_empty() {
                return Err(refuse("the path is empty").into());
            }
            return Ok(Address::Unix(path.into()));
        }
        let Some((host, port)) = text.rsplit_once(':') else {
            return Err(refuse("the port is missing").into());
        };
        if port.parse::<u16>().is_err() {
            return Err(refuse("the port is not a number from 0 to 65535").into());
        }
        if host.is_empty() {
            return Err(refuse("the address before the port is missing").into());
        }
        Ok(Address::Tcp(text.to_owned()))
    }

    async fn listen(&self) -> Result<Listener> {
        match self {
            Address::Tcp(address) => {
                let listener = TcpListener::bind(address).await.map_err(|error| {
                    let refused = UserError::new(format!("can not listen on `{address}`: {error}"));
                    match error.kind() {
                        io::ErrorKind::AddrInUse => refused
                            .remedy("stop the program that uses the port, or choose another with `--bind`"),
                        io::ErrorKind::PermissionDenied => {
                            refused.remedy("choose a port above 1023, or grant the right to use lower ones")
                        }
                        _ => refused.remedy("choose an address of this machine with `--bind`"),
                    }
                })?;
                Ok(Listener::Tcp(listener))
            }
            Address::Unix(path) => {
                remove_stale_socket(path);
                let listener = UnixListener::bind(path).map_err(|error| {
                    let refused =
                        UserError::new(format!("can not listen on `unix:{}`: {error}", path.display()));
                    match error.kind() {
                        io::ErrorKind::AddrInUse => refused.remedy(
                            "stop the server that uses the socket, or remove the file that is in the way",
                        ),
                        _ => refused.remedy("choose a path in a directory that exists and can be written"),
                    }
                })?;
                Ok(Listener::Unix(listener, path.clone()))
            }
        }
    }
}

/// Removes a socket that a dead server left behind: one that nobody answers on.
fn remove_stale_socket(path: &Path) {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket());
    if is_socket
        && let Err(error) = std::os::unix::net::UnixStream::connect(path)
        && error.kind() == io::ErrorKind::ConnectionRefused
    {
        // If this fails, so does the bind, with a message.
        let _ = std::fs::remove_file(path);
    }
}

/// A bound socket.
enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener, PathBuf),
}

impl Listener {
    fn url(&self) -> String {
        match self {
            Listener::Tcp(listener) => match listener.local_addr() {
                Ok(address) => format!("http://{address}"),
                Err(_) => "http".into(),
            },
            Listener::Unix(_, path) => format!("unix:{}", path.display()),
        }
    }

    async fn accept(&self) -> io::Result<(Box<dyn Stream>, Connection)> {
        match self {
            Listener::Tcp(listener) => {
                let (stream, peer) = listener.accept().await?;
                // Each piece of a response goes out as it comes; Nagle's
                // algorithm would hold it back for the client's next ACK.
                stream.set_nodelay(true)?;
                let local = stream.local_addr()?;
                let connection = Connection {
                    server_name: local.ip().to_canonical().to_string(),
                    server_port: local.port().to_string(),
                    peer: Some(peer),
                };
                Ok((Box::new(stream), connection))
            }
            Listener::Unix(listener, _) => {
                let (stream, _) = listener.accept().await?;
                // PEP 3333 wants both names; these are what clients of a unix
                // socket send as `Host`.
                let connection =
                    Connection { server_name: "localhost".into(), server_port: "80".into(), peer: None };
                Ok((Box::new(stream), connection))
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Listener::Unix(_, path) = self {
            // A socket that nobody listens on only misleads.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// A byte stream of either kind.
trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_or_refused_with_a_remedy() {
        assert_eq!(Address::parse("127.0.0.1:0").unwrap(), Address::Tcp("127.0.0.1:0".into()));
        assert_eq!(Address::parse("[::1]:80").unwrap(), Address::Tcp("[::1]:80".into()));
        assert_eq!(Address::parse("unix:/run/x.sock").unwrap(), Address::Unix("/run/x.sock".into()));
        for bad in ["8000", "127.0.0.1", "127.0.0.1:http", "127.0.0.1:70000", ":8000", "unix:", ""] {
            let error = Address::parse(bad).unwrap_err();
            assert!(error.is::<UserError>(), "{bad}");
            assert!(error.to_string().contains("help:"), "{bad}");
        }
    }
}
