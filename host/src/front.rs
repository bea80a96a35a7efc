//! What happens to a request around the app: checks, proxies' headers, static
//! files, compression, and the access log.
//!
//! [`answer`] is called by hyper for each request and hands those for the app
//! to [`crate::handler`].

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use http::header::{self, HeaderName, HeaderValue};
use http::request::Parts;
use http::{HeaderMap, Method, Request, Response, StatusCode, Uri, Version};
use http_body::{Body as _, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::time::Sleep;

use crate::access_log::{AccessLog, Line};
use crate::compress::{self, Compressed};
use crate::connection::{Active, Link, Server};
use crate::exchange::has_no_body;
use crate::failure::Failure;
use crate::footprint::{self, Footprint, Held};
use crate::forwarded::Proxies;
use crate::handler::{self, Progress, ResponseBody};
use crate::request_id::RequestId;
use crate::stall::Stall;
use crate::static_files::Mount;
use crate::tenants::Tenants;
use crate::wire;

const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Largest piece of a body that is handed to HTTP/2 at a time, so that it is
/// seen whether the client takes the pieces.
const PIECE: usize = 64 << 10;
/// Bytes of a body that a connection's task gets in one turn, and what a piece
/// counts besides its own: it is written by itself.
const TURN: usize = 64 << 10;
const PIECE_COST: usize = 4 << 10;
/// How long one waits after its turn whose tenant is ahead of others.
const PAUSE: Duration = Duration::from_millis(1);

/// What answers requests.
pub struct Front {
    /// The apps.
    pub tenants: Arc<Tenants>,
    /// Who may say who the client is.
    pub proxies: Proxies,
    /// Directories that the host serves itself.
    pub mounts: Vec<Mount>,
    /// Whether responses are compressed.
    pub compress: bool,
    /// Where requests are logged.
    pub access_log: Option<Arc<AccessLog>>,
}

impl Front {
    /// Whether this peer may say who the client is.
    pub fn trusts(&self, peer: Option<SocketAddr>) -> bool {
        self.proxies.trusts(peer.map(|peer| peer.ip()))
    }
}

/// Answers `request`. Never fails: a failure becomes a response here.
///
/// # Errors
///
/// None; the type is what hyper asks for.
pub async fn answer(
    server: Arc<Server>,
    link: Arc<Link>,
    request: Request<Incoming>,
) -> Result<Response<Body>, Infallible> {
    let front = &server.front;
    let (number, active) = link.begin();
    let (mut parts, incoming) = request.into_parts();
    let id = request_id(&link, &parts);
    let refused = link.refusal(number);
    let mut record = front.access_log.as_ref().map(|log| {
        let has_head = refused.is_none();
        Box::new(Record::new(Arc::clone(log), &parts, has_head, link.connection.peer, id))
    });
    let outcome = match refused {
        Some(failure) => Err(failure),
        None => respond(&server, &link, id, &mut parts, incoming, record.as_deref_mut()).await,
    };
    let mut response = outcome.unwrap_or_else(|failure| {
        tracing::info!(request = %id, peer = ?link.connection.peer, "{failure}");
        handler::refusal(failure, id).map(Kind::App)
    });
    if front.compress {
        response = compress::apply(&parts.method, &parts.headers, response);
    }
    if link.is_h2 {
        // It has no such header (RFC 9113 section 8.2.2).
        response.headers_mut().remove(header::CONNECTION);
        hold_head(&mut response);
    } else if number >= link.limit || must_close(&link, &parts, &response) {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        // Else hyper says `keep-alive` too, to an HTTP/1.0 client that has asked for it.
        *response.version_mut() = parts.version;
    }
    if let Some(record) = &mut record {
        record.status = response.status().as_u16();
        record.wants_no_body = is_bodiless(&parts.method, response.status());
    }
    let stall = link.is_h2.then(Stall::current).flatten();
    Ok(response.map(|kind| Body { kind, stall, rest: Bytes::new(), turn: 0, pause: None, record, active }))
}

/// Ties what the head of an HTTP/2 response costs to the head itself: one of its
/// values has it, in the same bytes.
///
/// h2 keeps heads that the client does not take, up to one for each stream that the
/// client may have, while hyper drops the body as soon as h2 has all of it. That
/// is at once if the body is short, or there is none. A value is gone when h2 has
/// made a frame of its head, and of such frames a connection keeps one.
fn hold_head(response: &mut Response<Kind>) {
    let left = if response.body().is_end() { 0 } else { footprint::MESSAGE };
    let Some(held) = response.body_mut().head().map(|held| held.split_off(left)) else { return };
    let headers = response.headers_mut();
    let is_announced = headers.contains_key(header::CONTENT_LENGTH);
    let value =
        if is_announced { headers.get_mut(header::CONTENT_LENGTH) } else { headers.values_mut().next() };
    // Without fields it costs next to nothing.
    let Some(value) = value else { return };
    if let Ok(mut tied) = HeaderValue::from_maybe_shared(held.tie(value.clone())) {
        // Or h2 keeps the value in its table, to name it again by a number. It
        // never does so with lengths.
        tied.set_sensitive(!is_announced);
        *value = tied;
    }
}

/// Whether the connection ends after this response: hyper closes it if the
/// client is still sending a body that nobody reads. And to HTTP/1.0 a body of
/// unknown length is one that ends with the connection, whatever hyper says.
fn must_close(link: &Link, parts: &Parts, response: &Response<Kind>) -> bool {
    let is_unread = link.in_body() && !response.body().is_live();
    let has_length = response.body().length().is_some()
        || response.headers().contains_key(header::CONTENT_LENGTH)
        || is_bodiless(&parts.method, response.status());
    is_unread || (parts.version == Version::HTTP_10 && !has_length)
}

/// Whether a response has no body, whatever its app says.
fn is_bodiless(method: &Method, status: StatusCode) -> bool {
    *method == Method::HEAD || has_no_body(status)
}

/// The steps around the app.
async fn respond(
    server: &Server,
    link: &Link,
    id: RequestId,
    parts: &mut Parts,
    incoming: Incoming,
    record: Option<&mut Record>,
) -> Result<Response<Kind>, Failure> {
    let front = &server.front;
    wire::check_request(parts, &server.limits.head)?;
    let connection = front.proxies.apply(link.is_trusted, parts, &link.connection)?;
    if let Some((mount, name)) = Mount::find(&front.mounts, parts.uri.path()) {
        if let Some(record) = record {
            record.client = connection.peer;
        }
        return Ok(handler::static_file(mount, name, parts, id).await.map(Kind::App));
    }
    let mut unlogged = Progress::default();
    let mut record = record;
    let progress = match record.as_deref_mut() {
        Some(record) => {
            record.client = connection.peer;
            &mut record.progress
        }
        None => &mut unlogged,
    };
    let response = handler::handle(&front.tenants, &connection, id, parts, incoming, progress).await;
    if let Some(tenant) = &progress.tenant {
        link.end_after(tenant.app.limits.response_time);
    }
    if let Some(record) = record
        && matches!(response.body(), ResponseBody::Complete { .. })
    {
        record.guest = record.progress.leased.map(|leased| leased.elapsed());
    }
    Ok(response.map(Kind::App))
}

/// The id that a trusted proxy has given, or a new one.
fn request_id(link: &Link, parts: &Parts) -> RequestId {
    let given = || RequestId::given(parts.headers.get(X_REQUEST_ID)?.as_bytes());
    link.is_trusted.then(given).flatten().unwrap_or_else(RequestId::next)
}

/// What a body consists of.
#[expect(clippy::large_enum_variant, reason = "the usual one; a box would cost each response an allocation")]
pub enum Kind {
    /// From the app, a file, or one of our own refusals.
    App(ResponseBody),
    /// The same, compressed.
    Compressed(Box<Compressed>),
}

impl Kind {
    /// The next piece.
    pub fn poll_piece(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Failure>>> {
        match self {
            Kind::App(body) => Pin::new(body).poll_frame(context),
            Kind::Compressed(body) => body.poll_piece(context),
        }
    }

    /// What the head costs, if it is an app's, and the response around it.
    pub fn head(&mut self) -> Option<&mut Held> {
        match self {
            Kind::App(body) => body.head(),
            Kind::Compressed(compressed) => compressed.body().head(),
        }
    }

    /// What the tenant holds whose response it is, if it is not our own.
    pub fn footprint(&self) -> Option<&Arc<Footprint>> {
        match self {
            Kind::App(body) => body.footprint(),
            Kind::Compressed(_) => None,
        }
    }

    /// Whether it is made by an app whose tenant has had more than its part while
    /// others want to compute.
    fn is_ahead(&self) -> bool {
        match self {
            Kind::App(body) => body.is_ahead(),
            Kind::Compressed(_) => false,
        }
    }

    fn is_end(&self) -> bool {
        match self {
            Kind::App(body) => body.is_end_stream(),
            Kind::Compressed(_) => false,
        }
    }

    /// How many bytes it has, if that is known.
    pub fn length(&self) -> Option<u64> {
        match self {
            Kind::App(body) => body.size_hint().exact(),
            Kind::Compressed(_) => None,
        }
    }

    /// Whether each piece is to go out as it comes.
    pub fn is_live(&self) -> bool {
        matches!(self, Kind::App(ResponseBody::Streaming(_)))
    }
}

/// The body of a response, on its way to the client.
pub struct Body {
    kind: Kind,
    /// Tells the stream's task that the client has something to take.
    stall: Option<Stall>,
    /// What is left of a piece that was too large (HTTP/2 only).
    rest: Bytes,
    /// What the connection's task has got in its turn.
    turn: usize,
    /// It waits, since its tenant is ahead of others.
    pause: Option<Pin<Box<Sleep>>>,
    record: Option<Box<Record>>,
    active: Active,
}

impl Body {
    fn poll_piece(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Bytes, Failure>>> {
        if self.rest.is_empty() {
            match ready!(self.kind.poll_piece(context)) {
                None => return Poll::Ready(None),
                Some(Err(failure)) => return Poll::Ready(Some(Err(failure))),
                Some(Ok(frame)) => self.rest = frame.into_data().unwrap_or_default(),
            }
        }
        let most = if self.stall.is_some() { PIECE } else { usize::MAX };
        let piece = self.rest.split_to(self.rest.len().min(most));
        self.turn += piece.len() + PIECE_COST;
        Poll::Ready(Some(Ok(piece)))
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = Failure;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Failure>>> {
        let body = self.get_mut();
        if let Some(stall) = &body.stall {
            stall.taken();
        }
        if body.turn >= TURN {
            // Others' requests come first. hyper would go on for as long as the
            // client takes it, a megabyte and more.
            body.turn = 0;
            if !body.kind.is_ahead() {
                context.waker().wake_by_ref();
                return Poll::Pending;
            }
            body.pause = Some(Box::pin(tokio::time::sleep(PAUSE)));
        }
        if let Some(pause) = &mut body.pause {
            ready!(pause.as_mut().poll(context));
            body.pause = None;
        }
        let Poll::Ready(piece) = body.poll_piece(context) else {
            body.turn = 0;
            return Poll::Pending;
        };
        if let (Some(stall), Some(Ok(piece))) = (&body.stall, &piece) {
            stall.given();
            body.active.gives(piece.len());
        }
        if let Some(record) = &mut body.record {
            match &piece {
                Some(Ok(piece)) => record.bytes += piece.len() as u64,
                Some(Err(_)) => {}
                None => record.has_ended = true,
            }
        }
        if let (Some(record), true) = (&mut body.record, body.rest.is_empty() && body.kind.is_end()) {
            // hyper does not ask again.
            record.has_ended |= matches!(piece, Some(Ok(_)));
        }
        Poll::Ready(piece.map(|piece| piece.map(Frame::data)))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.kind.is_end()
    }

    fn size_hint(&self) -> SizeHint {
        match self.kind.length() {
            Some(length) => SizeHint::with_exact(length + self.rest.len() as u64),
            None => SizeHint::default(),
        }
    }
}

/// What the access log will say of a request, written when the response's
/// body is dropped.
struct Record {
    log: Arc<AccessLog>,
    id: RequestId,
    time: SystemTime,
    start: Instant,
    client: Option<SocketAddr>,
    /// Method, target and version; none if they were not valid.
    head: Option<(Method, Uri, Version)>,
    host: Option<HeaderValue>,
    referer: Option<HeaderValue>,
    user_agent: Option<HeaderValue>,
    progress: Progress,
    /// How long the guest was at work, if that is over.
    guest: Option<Duration>,
    status: u16,
    bytes: u64,
    wants_no_body: bool,
    has_ended: bool,
}

impl Record {
    fn new(
        log: Arc<AccessLog>,
        parts: &Parts,
        has_head: bool,
        client: Option<SocketAddr>,
        id: RequestId,
    ) -> Record {
        let value = |headers: &HeaderMap, name| headers.get(name).cloned();
        Record {
            log,
            id,
            time: SystemTime::now(),
            start: Instant::now(),
            client,
            head: has_head.then(|| (parts.method.clone(), parts.uri.clone(), parts.version)),
            host: value(&parts.headers, header::HOST),
            referer: value(&parts.headers, header::REFERER),
            user_agent: value(&parts.headers, header::USER_AGENT),
            progress: Progress::default(),
            guest: None,
            status: 0,
            bytes: 0,
            wants_no_body: false,
            has_ended: false,
        }
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let target = self.head.as_ref().and_then(|(_, uri, _)| uri.path_and_query());
        let authority = self.head.as_ref().and_then(|(_, uri, _)| uri.authority());
        let is_answered = self.status != 0 && !self.progress.is_deserted;
        let still_working = || self.progress.leased.map(|leased| leased.elapsed()).unwrap_or_default();
        self.log.write(&Line {
            time: self.time,
            client: self.client.map(|client| client.ip().to_canonical()),
            method: self.head.as_ref().map(|(method, _, _)| method.as_str()),
            target: target.map_or("*", |target| target.as_str()),
            protocol: match self.head {
                Some((_, _, Version::HTTP_10)) => "HTTP/1.0",
                Some((_, _, Version::HTTP_2)) => "HTTP/2.0",
                _ => "HTTP/1.1",
            },
            host: authority
                .map(|authority| authority.as_str().as_bytes())
                .or(self.host.as_ref().map(HeaderValue::as_bytes)),
            referer: self.referer.as_ref().map(HeaderValue::as_bytes),
            user_agent: self.user_agent.as_ref().map(HeaderValue::as_bytes),
            // The client left before there was a response.
            status: if is_answered { self.status } else { 499 },
            bytes: self.bytes,
            is_whole: is_answered && (self.has_ended || self.wants_no_body),
            app: self.progress.tenant.as_ref().map_or("", |tenant| tenant.config.name.as_str()),
            request: &self.id,
            total: self.start.elapsed(),
            queued: self.progress.queued(),
            guest: self.guest.unwrap_or_else(still_working),
        });
    }
}
