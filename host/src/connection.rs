//! One connection, from its first byte to its last: PROXY header, TLS, and
//! then HTTP/1.1 or HTTP/2 by what the client sends first.
//!
//! [`Wire`] stands between hyper and the socket. It approves the bytes of
//! HTTP/1.1 by the rules of [`crate::wire`], and holds the time limits that
//! hyper does not have.

#[cfg(test)]
mod fuzz;

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf as _, BytesMut};
use http::Request;
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{Instant, Sleep};

use crate::early_hints;
use crate::environ::Connection;
use crate::failure::Failure;
use crate::front::{self, Front};
use crate::listener::{Accepted, Stream};
use crate::proxy_protocol;
use crate::stall::{Stall, Watched};
use crate::tls::Tls;
use crate::wire::{self, Frames, HeadLimits, PREFACE, Scan};

/// Bytes that hyper collects of a response before it writes. Its least is
/// 8 KiB.
const CONNECTION_BUFFER: usize = 64 << 10;
/// Bytes read at a time while a head is not complete.
const READ: usize = 8 << 10;
/// How long, and for how many bytes, a connection that is closed early still
/// takes what the client had under way. Else the kernel answers those bytes
/// with a reset, and the client may lose the response it has not yet read.
const LINGER: (Duration, usize) = (Duration::from_secs(1), 1 << 20);
/// How much is read of it at a time, and how long it waits until the next time.
const LINGER_READ: usize = 64 << 10;
const LINGER_PAUSE: Duration = Duration::from_millis(50);
/// Connections that are closed that way at a time.
const LINGERERS: usize = 64;
/// How long an HTTP/2 client without a request has for a last one that was
/// under way when it was told that the connection ends. hyper waits for it to
/// answer a PING (RFC 9113 section 6.8), for ever.
const GOODBYE: Duration = Duration::from_secs(1);
/// How long a client that was not yet heard when the server was told to stop
/// has to ask for something.
const LAST_CALL: Duration = Duration::from_secs(1);
/// A frame that h2 ends a connection for, with GOAWAY: SETTINGS on a stream.
const LAST_FRAME: &[u8] = b"\0\0\0\x04\0\0\0\0\x01";

/// Limits for a connection.
#[derive(Clone, Debug)]
pub struct ConnectionLimits {
    /// Time in which the first byte, a handshake, and the head of a request
    /// must be complete.
    pub header_timeout: Duration,
    /// Time that a connection without a request stays open.
    pub keep_alive: Duration,
    /// Requests on one connection.
    pub requests: u64,
    /// Time in which a client must take something of a response.
    pub client_idle: Duration,
    /// The head of a request.
    pub head: HeadLimits,
    /// Requests at a time on one HTTP/2 connection.
    pub streams: u32,
    /// Streams of an HTTP/2 connection that a client may reset before we have
    /// looked at them, and that we may reset for its mistakes.
    pub resets: usize,
    /// One permit per connection that is closed early and still read.
    pub lingerers: Arc<Semaphore>,
}

/// Places for connections that are closed early and still read. Reading costs the
/// kernel more than us, and one who floods us with what is to be read does not wait
/// for it. Where there is no place, a connection is closed at once.
pub fn lingerers() -> Arc<Semaphore> {
    Arc::new(Semaphore::new(LINGERERS))
}

/// What every connection needs.
pub struct Server {
    /// What answers.
    pub front: Front,
    /// Limits for each connection.
    pub limits: ConnectionLimits,
    /// Certificates, for the listeners that speak TLS.
    pub tls: Option<Arc<Tls>>,
    /// Whether each TCP connection begins with a PROXY header.
    pub proxy_protocol: bool,
    /// One permit per open connection.
    pub connections: Arc<Semaphore>,
    /// Connections per client address.
    pub peers: Peers,
}

/// What the requests of one connection share.
pub struct Link {
    /// Where it came in and who is on its other end.
    pub connection: Arc<Connection>,
    /// Whether it speaks HTTP/2.
    pub is_h2: bool,
    /// Whether the other end may say who the client is.
    pub is_trusted: bool,
    /// Requests that it may have.
    pub limit: u64,
    /// Requests that came.
    requests: AtomicU64,
    /// Requests whose response is not yet complete.
    active: AtomicU64,
    /// Wakes up when a response is complete (HTTP/2 only).
    idle: Notify,
    /// When the response that goes out has to be complete (HTTP/1 only; each
    /// stream of HTTP/2 has its own).
    end: Mutex<Option<Instant>>,
    /// The request that was refused on the wire, by its number, and why.
    refused: OnceLock<(u64, Failure)>,
    /// Whether the body of a request is still under way (HTTP/1 only).
    in_body: AtomicBool,
    /// Frames that the client may send for what it has asked for (HTTP/2 only).
    earned: AtomicU64,
}

impl Link {
    fn new(is_trusted: bool, limit: u64, connection: Connection, is_h2: bool) -> Arc<Link> {
        Arc::new(Link {
            connection: Arc::new(connection),
            is_h2,
            is_trusted,
            limit,
            requests: AtomicU64::new(0),
            active: AtomicU64::new(0),
            idle: Notify::new(),
            end: Mutex::default(),
            refused: OnceLock::new(),
            in_body: AtomicBool::new(false),
            earned: AtomicU64::new(0),
        })
    }

    /// Counts a request in, until the guard is dropped. Returns its number,
    /// from 1 on.
    pub fn begin(self: &Arc<Link>) -> (u64, Active) {
        self.active.fetch_add(1, Ordering::Relaxed);
        *self.end.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.earned.fetch_add(wire::FRAMES_PER_REQUEST, Ordering::Relaxed);
        (self.requests.fetch_add(1, Ordering::Relaxed) + 1, Active(Arc::clone(self)))
    }

    /// Whether the client still sends the body of a request.
    pub fn in_body(&self) -> bool {
        self.in_body.load(Ordering::Relaxed)
    }

    /// The response that begins now may take so long.
    pub fn end_after(&self, time: Duration) {
        let Some(end) = Instant::now().checked_add(time) else { return };
        if self.is_h2 {
            Stall::current().inspect(|stall| stall.end_at(end));
        } else {
            *self.end.lock().unwrap_or_else(PoisonError::into_inner) = Some(end);
        }
    }

    /// How long the response that goes out still may take.
    fn time_left(&self) -> Duration {
        let end = *self.end.lock().unwrap_or_else(PoisonError::into_inner);
        end.map_or(Duration::MAX, |end| end.saturating_duration_since(Instant::now()))
    }

    /// Why the request with this number was refused before hyper saw it.
    pub fn refusal(&self, number: u64) -> Option<Failure> {
        self.refused.get().filter(|(refused, _)| *refused == number).map(|(_, failure)| *failure)
    }
}

/// A request that is being answered.
pub struct Active(Arc<Link>);

impl Active {
    /// A piece of the response, so many bytes long, is handed over.
    pub fn gives(&self, bytes: usize) {
        let frames = wire::FRAMES_PER_PIECE + bytes as u64 / wire::BYTES_PER_FRAME;
        self.0.earned.fetch_add(frames, Ordering::Relaxed);
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        self.0.active.fetch_sub(1, Ordering::Relaxed);
        if self.0.is_h2 {
            self.0.idle.notify_one();
        }
    }
}

/// Speaks HTTP on one connection.
pub async fn converse(
    server: Arc<Server>,
    accepted: Accepted,
    permit: OwnedSemaphorePermit,
    mut stopping: watch::Receiver<bool>,
) {
    let _permit = permit;
    let peer = accepted.connection.peer;
    let ready = tokio::select! {
        ready = tokio::time::timeout(server.limits.header_timeout, prepare(&server, accepted)) => ready,
        // Nothing was asked for.
        () = told_to_end(&mut stopping, true) => return,
    };
    let is_late = *stopping.borrow();
    let result = match ready {
        Ok(Ok(Some(prepared))) if prepared.is_h2 => http2(&server, prepared, is_late, stopping).await,
        Ok(Ok(Some(prepared))) => http1(&server, prepared, is_late, stopping).await,
        Ok(Ok(None)) => return,
        Ok(Err(error)) => Err(error.into()),
        Err(_) => Err("the client sent no request in time".into()),
    };
    if let Err(error) = result {
        tracing::debug!(?peer, "connection ended: {error}");
    }
}

/// Returns when the server is told to stop, or is gone.
pub async fn stopped(stopping: &mut watch::Receiver<bool>) {
    let _ = stopping.wait_for(|stop| *stop).await;
}

/// Returns when a connection is to end: when the server stops, or a moment
/// later if its client was not heard before that.
async fn told_to_end(stopping: &mut watch::Receiver<bool>, is_late: bool) {
    stopped(stopping).await;
    if is_late {
        tokio::time::sleep(LAST_CALL).await;
    }
}

type Ended = Result<(), Box<dyn std::error::Error + Send + Sync>>;

/// A connection on which HTTP can begin.
struct Prepared {
    stream: Box<dyn Stream>,
    /// What was read already.
    first: BytesMut,
    is_h2: bool,
    connection: Connection,
    counted: Counted,
}

/// Reads what comes before HTTP, and tells its version by the first bytes.
/// None if the client left without a word.
async fn prepare(server: &Server, accepted: Accepted) -> io::Result<Option<Prepared>> {
    let Accepted { mut stream, mut connection, is_tls } = accepted;
    if server.proxy_protocol && connection.peer.is_some() {
        let header = proxy_protocol::read(&mut stream).await?;
        header.apply(&mut connection);
    }
    // Only now it is known whose it is.
    let counted = server.peers.admit(connection.peer.map(|peer| peer.ip()));
    let Some(counted) = counted else {
        return Err(io::Error::other("there are too many from this address"));
    };
    if let Some(tls) = server.tls.as_ref().filter(|_| is_tls) {
        let secured = tls.accept(stream).await?;
        connection.is_https = true;
        connection.client_certificate = secured.client_certificate;
        stream = secured.stream;
    }
    let mut first = BytesMut::with_capacity(READ);
    loop {
        let common = first.len().min(PREFACE.len());
        if first[..common] != PREFACE[..common] {
            return Ok(Some(Prepared { stream, first, is_h2: false, connection, counted }));
        }
        if common == PREFACE.len() {
            return Ok(Some(Prepared { stream, first, is_h2: true, connection, counted }));
        }
        if stream.read_buf(&mut first).await? == 0 {
            return Ok(None);
        }
    }
}

/// What the requests of a connection share.
fn link(server: &Server, connection: Connection, is_h2: bool, is_late: bool) -> Arc<Link> {
    let limit = if is_late { 1 } else { server.limits.requests };
    Link::new(server.front.trusts(connection.peer), limit, connection, is_h2)
}

async fn http1(
    server: &Arc<Server>,
    prepared: Prepared,
    is_late: bool,
    mut stopping: watch::Receiver<bool>,
) -> Ended {
    let limits = &server.limits;
    let Prepared { stream, first, connection, counted: _counted, .. } = prepared;
    let link = link(server, connection, false, is_late);
    let wire = Wire::new(stream, first, Some(Scan::new(limits.head)), Arc::clone(&link), limits);
    let (wire, hints) = early_hints::layer(wire);
    let service = service_fn(|mut request: Request<Incoming>| {
        request.extensions_mut().insert(hints.clone());
        front::answer(Arc::clone(server), Arc::clone(&link), request)
    });
    let mut conversation =
        std::pin::pin!(http1_builder(limits).serve_connection(TokioIo::new(wire), service));
    let ended = tokio::select! {
        // In this order: what is here already is a request under way.
        biased;
        ended = conversation.as_mut() => ended,
        () = told_to_end(&mut stopping, is_late) => {
            // Ends after the response that is under way, or now if there is none.
            conversation.as_mut().graceful_shutdown();
            conversation.await
        }
    };
    ended.map_err(Into::into)
}

/// How hyper is to speak HTTP/1.
fn http1_builder(limits: &ConnectionLimits) -> http1::Builder {
    let mut builder = http1::Builder::new();
    builder
        // Only for the `Date` header: the time limits are ours.
        .timer(TokioTimer::new())
        .header_read_timeout(None)
        // As apps write them and older clients expect them; hyper keeps no
        // spelling of ours.
        .title_case_headers(true)
        // Not `pipeline_flush`: with it hyper buffers bodies without a bound.
        .max_buf_size(CONNECTION_BUFFER.max(limits.head.bytes + READ));
    if limits.head.fields > 100 {
        // Up to a hundred hyper keeps on the stack.
        builder.max_headers(limits.head.fields);
    }
    builder
}

async fn http2(
    server: &Arc<Server>,
    prepared: Prepared,
    is_late: bool,
    mut stopping: watch::Receiver<bool>,
) -> Ended {
    let limits = &server.limits;
    let Prepared { stream, first, connection, counted: _counted, .. } = prepared;
    let link = link(server, connection, true, is_late);
    let wire = Wire::new(stream, first, None, Arc::clone(&link), limits);
    let service = service_fn(|request| front::answer(Arc::clone(server), Arc::clone(&link), request));
    let mut builder = http2::Builder::new(StreamTasks { limit: limits.client_idle });
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(limits.streams)
        // Rapid reset: more than these unseen, and the connection ends.
        .max_pending_accept_reset_streams(limits.resets)
        .max_local_error_reset_streams(limits.resets)
        // h2 also ends a connection whose CONTINUATION frames go far beyond.
        .max_header_list_size(u32::try_from(limits.head.bytes).unwrap_or(u32::MAX))
        .max_send_buf_size(CONNECTION_BUFFER)
        // A dead client is found out even if nothing is sent to it.
        .keep_alive_interval(limits.keep_alive)
        .keep_alive_timeout(limits.header_timeout);
    let mut conversation = std::pin::pin!(builder.serve_connection(TokioIo::new(wire), service));
    let mut leaving = false;
    loop {
        // Without a request for as long as a connection may idle, or with all
        // it may ask for: say goodbye (GOAWAY), and cut when nothing comes of it.
        let idle = idle(&link, if leaving { GOODBYE } else { limits.keep_alive });
        let spent = async {
            while link.requests.load(Ordering::Relaxed) < link.limit {
                link.idle.notified().await;
            }
        };
        tokio::select! {
            ended = conversation.as_mut() => return ended.map_err(Into::into),
            () = told_to_end(&mut stopping, is_late), if !leaving => {}
            () = spent, if !leaving => {}
            () = idle => {
                if leaving {
                    // It was told, and has all that it asked for.
                    return Ok(());
                }
            }
        }
        leaving = true;
        conversation.as_mut().graceful_shutdown();
    }
}

/// Returns when no request was active for `time`.
async fn idle(link: &Link, time: Duration) {
    let mut seen = link.requests.load(Ordering::Relaxed);
    let mut since = Instant::now();
    loop {
        tokio::time::sleep_until(since + time).await;
        let now = link.requests.load(Ordering::Relaxed);
        if link.active.load(Ordering::Relaxed) == 0 && now == seen {
            return;
        }
        (seen, since) = (now, Instant::now());
    }
}

/// Runs the streams of an HTTP/2 connection, each as a task that ends when its
/// client takes nothing for too long. A stream that ends early is reset.
#[derive(Clone)]
struct StreamTasks {
    limit: Duration,
}

impl<F> hyper::rt::Executor<F> for StreamTasks
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, stream: F) {
        tokio::spawn(Watched::new(stream, Stall::default(), self.limit));
    }
}

type Counts = Arc<Mutex<HashMap<IpAddr, u32>>>;

/// How many connections each client address has.
pub struct Peers {
    limit: u32,
    /// Networks that many clients come from: proxies.
    exempt: Box<dyn Fn(IpAddr) -> bool + Send + Sync>,
    counts: Counts,
}

impl Peers {
    /// Allows `limit` connections per address but for those that are `exempt`.
    pub fn new(limit: u32, exempt: impl Fn(IpAddr) -> bool + Send + Sync + 'static) -> Peers {
        Peers { limit, exempt: Box::new(exempt), counts: Arc::default() }
    }

    /// Counts a connection until the guard is dropped; none if it is one too
    /// many.
    fn admit(&self, peer: Option<IpAddr>) -> Option<Counted> {
        let Some(peer) = peer.map(network).filter(|peer| !(self.exempt)(*peer)) else {
            return Some(Counted(None));
        };
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(peer).or_default();
        if *count >= self.limit {
            return None;
        }
        *count += 1;
        Some(Counted(Some((peer, Arc::clone(&self.counts)))))
    }
}

/// What one customer usually has: an IPv4 address, or an IPv6 network of /64.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6((address.to_bits() & !u128::from(u64::MAX)).into()),
        address => address,
    }
}

/// A connection that was counted.
struct Counted(Option<(IpAddr, Counts)>);

impl Drop for Counted {
    fn drop(&mut self) {
        let Some((peer, counts)) = self.0.take() else { return };
        let mut counts = counts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&peer) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&peer);
            }
        }
    }
}

/// A stream that lets pass only what the rules allow, in the time they allow.
struct Wire {
    stream: Box<dyn Stream>,
    link: Arc<Link>,
    /// Follows the messages; none for HTTP/2, which h2 does better.
    scan: Option<Scan>,
    /// Follows the frames of HTTP/2.
    frames: Option<Frames>,
    /// Bytes that were read and not yet handed on.
    held: BytesMut,
    /// How many of them may be.
    approved: usize,
    /// What hyper reads in place of a request that was refused.
    stand_in: &'static [u8],
    is_refused: bool,
    /// Why the body of a request can not be read to its end.
    broken: Option<Failure>,
    /// When the wait began for the head or the rest of it.
    waiting: Option<Instant>,
    read_timer: Option<Pin<Box<Sleep>>>,
    write_timer: Option<Pin<Box<Sleep>>>,
    header_timeout: Duration,
    keep_alive: Duration,
    client_idle: Duration,
    closing: Closing,
    lingerers: Arc<Semaphore>,
}

enum Closing {
    No,
    /// Our side is closed; so many bytes may still come, until then.
    Lingering {
        left: usize,
        end: Instant,
        _place: OwnedSemaphorePermit,
    },
}

impl Wire {
    fn new(
        stream: Box<dyn Stream>,
        held: BytesMut,
        scan: Option<Scan>,
        link: Arc<Link>,
        limits: &ConnectionLimits,
    ) -> Wire {
        let mut wire = Wire {
            stream,
            link,
            approved: 0,
            frames: scan.is_none().then(Frames::new),
            scan,
            held,
            stand_in: b"",
            is_refused: false,
            broken: None,
            waiting: None,
            read_timer: None,
            write_timer: None,
            header_timeout: limits.header_timeout,
            keep_alive: limits.keep_alive,
            client_idle: limits.client_idle,
            closing: Closing::No,
            lingerers: Arc::clone(&limits.lingerers),
        };
        wire.approve_held();
        wire
    }

    /// Approves what is held and was not yet.
    fn approve_held(&mut self) {
        let Some(scan) = &mut self.scan else {
            let passed = follow(&mut self.frames, &self.link, &self.held);
            self.approved = passed.unwrap_or(self.held.len());
            if passed.is_some() {
                self.calm();
            }
            return;
        };
        let approved = scan.approve(&self.held[self.approved..]);
        self.link.in_body.store(!scan.in_head(), Ordering::Relaxed);
        match approved {
            Ok(passed) => self.approved += passed,
            Err((passed, failure)) => {
                self.approved += passed;
                self.held.truncate(self.approved);
                self.refuse(failure);
            }
        }
    }

    /// Ends what may be read of this connection. A head that breaks a rule
    /// is replaced by one that hyper takes, so that the request is answered
    /// and logged like any other; a body just breaks off.
    fn refuse(&mut self, failure: Failure) {
        let Some(scan) = &self.scan else { return };
        self.is_refused = true;
        if scan.in_head() {
            // Set once: nothing is read after a refusal.
            let _ = self.link.refused.set((scan.heads() + 1, failure));
            self.stand_in = b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n";
        } else {
            self.broken = Some(failure);
        }
    }

    /// Ends an HTTP/2 connection whose client does nothing but keep us busy.
    fn calm(&mut self) {
        tracing::debug!(peer = ?self.link.connection.peer, "too many frames without progress");
        self.is_refused = true;
        self.stand_in = LAST_FRAME;
    }

    /// What remains to hand on of what is approved, then of the stand-in.
    fn hand_on(&mut self, buffer: &mut ReadBuf<'_>) -> bool {
        let length = self.approved.min(buffer.remaining());
        if length > 0 {
            buffer.put_slice(&self.held[..length]);
            self.held.advance(length);
            self.approved -= length;
            return true;
        }
        let length = self.stand_in.len().min(buffer.remaining());
        buffer.put_slice(&self.stand_in[..length]);
        self.stand_in = &self.stand_in[length..];
        length > 0
    }

    /// Whether the client has taken too long to send a head, or to begin one.
    fn poll_overdue(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let is_partial = !self.held.is_empty();
        let is_between =
            self.scan.as_ref().is_some_and(Scan::in_head) && self.link.active.load(Ordering::Relaxed) == 0;
        if !is_partial && !is_between {
            self.waiting = None;
            return Poll::Pending;
        }
        let limit = if is_partial { self.header_timeout } else { self.keep_alive };
        let deadline = *self.waiting.get_or_insert_with(Instant::now) + limit;
        // The timer is set only when it went off: most waits are short.
        let timer = self.read_timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(deadline)));
        if timer.deadline() > deadline {
            timer.as_mut().reset(deadline);
        }
        while timer.as_mut().poll(context).is_ready() {
            if deadline <= Instant::now() {
                return Poll::Ready(());
            }
            timer.as_mut().reset(deadline);
        }
        Poll::Pending
    }

    fn in_time<T>(&mut self, context: &mut Context<'_>, polled: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if polled.is_ready() {
            self.write_timer = None;
            return polled;
        }
        let limit = self.client_idle.min(self.link.time_left());
        let timer = self.write_timer.get_or_insert_with(|| Box::pin(tokio::time::sleep(limit)));
        ready!(timer.as_mut().poll(context));
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client takes too long")))
    }
}

impl AsyncRead for Wire {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let wire = self.get_mut();
        loop {
            if wire.hand_on(buffer) {
                return Poll::Ready(Ok(()));
            }
            if let Some(failure) = wire.broken {
                return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, failure)));
            }
            if wire.is_refused {
                // Neither more nor an end, which hyper would take for the
                // client's leave: it closes after the response.
                return Poll::Pending;
            }
            let Some(scan) = &mut wire.scan else {
                let before = buffer.filled().len();
                ready!(Pin::new(&mut wire.stream).poll_read(context, buffer))?;
                let Some(passed) = follow(&mut wire.frames, &wire.link, &buffer.filled()[before..]) else {
                    return Poll::Ready(Ok(()));
                };
                buffer.set_filled(before + passed);
                wire.calm();
                if passed > 0 {
                    return Poll::Ready(Ok(()));
                }
                continue;
            };
            if wire.held.is_empty() {
                // The usual way: into hyper's own buffer, and all of it is fine.
                let before = buffer.filled().len();
                let polled = Pin::new(&mut wire.stream).poll_read(context, buffer)?;
                if polled.is_pending() {
                    ready!(wire.poll_overdue(context));
                    // The end of an idle connection.
                    return Poll::Ready(Ok(()));
                }
                wire.waiting = None;
                let read = &buffer.filled()[before..];
                if read.is_empty() {
                    return Poll::Ready(Ok(()));
                }
                let approved = scan.approve(read);
                wire.link.in_body.store(!scan.in_head(), Ordering::Relaxed);
                match approved {
                    Ok(passed) => {
                        wire.held.extend_from_slice(&read[passed..]);
                        buffer.set_filled(before + passed);
                        if passed > 0 {
                            return Poll::Ready(Ok(()));
                        }
                    }
                    Err((passed, failure)) => {
                        buffer.set_filled(before + passed);
                        wire.refuse(failure);
                        if passed > 0 {
                            return Poll::Ready(Ok(()));
                        }
                    }
                }
                continue;
            }
            // The rest of a head.
            wire.held.reserve(READ);
            let polled = read_more(&mut wire.stream, context, &mut wire.held)?;
            match polled {
                Poll::Pending => {
                    ready!(wire.poll_overdue(context));
                    wire.held.clear();
                    wire.refuse(Failure::Refused(
                        http::StatusCode::REQUEST_TIMEOUT,
                        "the head of the request did not come in time",
                    ));
                }
                // The client left in the middle of a head.
                Poll::Ready(0) => return Poll::Ready(Ok(())),
                Poll::Ready(_) => {
                    wire.approve_held();
                    if wire.approved > 0 {
                        wire.waiting = None;
                    }
                }
            }
        }
    }
}

/// How many of the next bytes of an HTTP/2 connection may pass, if not all.
fn follow(frames: &mut Option<Frames>, link: &Link, bytes: &[u8]) -> Option<usize> {
    frames.as_mut()?.follow(bytes, &link.earned)
}

/// Reads what there is to the end of `buffer`.
fn read_more(
    stream: &mut Box<dyn Stream>,
    context: &mut Context<'_>,
    buffer: &mut BytesMut,
) -> io::Result<Poll<usize>> {
    let mut chunk = [0; READ];
    let mut read = ReadBuf::new(&mut chunk);
    Ok(match Pin::new(stream).poll_read(context, &mut read)? {
        Poll::Pending => Poll::Pending,
        Poll::Ready(()) => {
            buffer.extend_from_slice(read.filled());
            Poll::Ready(read.filled().len())
        }
    })
}

impl AsyncWrite for Wire {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.in_time(context, polled)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write_vectored(context, buffers);
        self.in_time(context, polled)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.stream).poll_flush(context);
        self.in_time(context, polled)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let wire = self.get_mut();
        if matches!(wire.closing, Closing::No) {
            let polled = Pin::new(&mut wire.stream).poll_shutdown(context);
            ready!(wire.in_time(context, polled))?;
            let is_whole = wire.scan.as_ref().is_none_or(Scan::in_head) && !wire.is_refused;
            let place = if is_whole { None } else { Arc::clone(&wire.lingerers).try_acquire_owned().ok() };
            let Some(place) = place else { return Poll::Ready(Ok(())) };
            wire.closing =
                Closing::Lingering { left: LINGER.1, end: Instant::now() + LINGER.0, _place: place };
            wire.read_timer = None;
        }
        let Closing::Lingering { left, end, .. } = &mut wire.closing else { return Poll::Ready(Ok(())) };
        loop {
            if let Some(pause) = &mut wire.read_timer {
                ready!(pause.as_mut().poll(context));
            }
            let mut chunk = vec![0; LINGER_READ];
            let mut chunk = ReadBuf::new(&mut chunk);
            while chunk.remaining() > 0 {
                let before = chunk.filled().len();
                match Pin::new(&mut wire.stream).poll_read(context, &mut chunk) {
                    Poll::Ready(Ok(())) if chunk.filled().len() > before => {}
                    Poll::Ready(_) => return Poll::Ready(Ok(())),
                    Poll::Pending => break,
                }
            }
            *left = left.saturating_sub(chunk.filled().len());
            let now = Instant::now();
            if *left == 0 || now >= *end {
                return Poll::Ready(Ok(()));
            }
            wire.read_timer = Some(Box::pin(tokio::time::sleep_until((now + LINGER_PAUSE).min(*end))));
        }
    }
}
