//! The path of a request: read this file first.
//!
//! [`handle`] is the whole way from a request's head to a response. The guest
//! runs inside the connection's own task: first polled by [`handle`] until the
//! head of the response is there, then by hyper through the body. A guest is
//! therefore not run while its client is too slow to take more. What it does
//! after a whole response, it does in a task of its own.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::header::{self, HeaderValue};
use http::{Method, Response, StatusCode, Version};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::sync::mpsc;

use crate::clock::Clock;
use crate::early_hints::EarlyHints;
use crate::environ::{self, Connection};
use crate::exchange::{Event, Exchange, Head, RequestBody};
use crate::failure::Failure;
use crate::file_part::FilePart;
use crate::footprint::{self, Footprint, Held};
use crate::instance::Reply;
use crate::pool::{Lease, Pool};
use crate::request_id::RequestId;
use crate::scheduler::{self, Share};
use crate::static_files::{self, FileBody, Mount};
use crate::tenants::{Tenant, Tenants};

/// A request body up to this size is read before an instance is taken, and
/// goes to the guest with the call: a slow client holds no instance.
const INLINE_BODY: u64 = 64 << 10;

/// Bytes of a complete response that hyper gets at a time.
const PIECE: usize = 256 << 10;

/// Limits for one request.
#[derive(Clone, Debug)]
pub struct RequestLimits {
    /// Bytes of a request body.
    pub body: u64,
    /// Bytes of a response body.
    pub response: u64,
    /// Time that a response may take once its head is out.
    pub response_time: Duration,
    /// Time that the guest may take until the head of its response, and again
    /// for each piece of the body.
    pub timeout: Duration,
    /// Processor time that one request may take.
    pub cpu: Option<Duration>,
    /// Time that a client may send or take no byte of a body.
    pub client_idle: Duration,
    /// Bytes of a body that a client must send in a second, on average, once
    /// it has had some seconds.
    pub rate: u64,
}

/// One app as the handler sees it.
pub struct App {
    /// Its instances.
    pub pool: Arc<Pool>,
    /// Limits for its requests.
    pub limits: RequestLimits,
    /// Its part in the use of the processors.
    pub share: Arc<Share>,
    /// What it holds of the host's memory.
    pub footprint: Arc<Footprint>,
}

/// Asks an app for `path`, as a request of our own, and returns the status.
///
/// # Errors
///
/// Why there was no response.
pub async fn probe(app: &Arc<App>, path: &str) -> Result<u16, Failure> {
    let id = RequestId::next();
    let environ = environ::of_our_own(path)?;
    let observer = Observer { tenant: None, id, method: Method::GET };
    let held = app.footprint.hold(environ.len() as u64);
    let input = Input { environ, inline: Bytes::new(), held, body: RequestBody::empty(), hints: None };
    let mut running = run(app, observer, input, &mut Progress::default()).await?;
    match poll_fn(|context| running.poll_first(context)).await? {
        First::Complete(head, _, outcome) => outcome.unwrap_or(Ok(())).map(|()| head.status.as_u16()),
        First::Streaming(head) | First::File(head, _) => Ok(head.status.as_u16()),
    }
}

/// How far a request has come, for the access log. It is filled as the request
/// goes on, for a client may leave at any time.
#[derive(Default)]
pub struct Progress {
    /// Whose app it is for.
    pub tenant: Option<Arc<Tenant>>,
    /// When it began to wait for an instance, and how long it did, if that is over.
    asked: Option<Instant>,
    waited: Option<Duration>,
    /// When it got an instance.
    pub leased: Option<Instant>,
    /// Whether the client left before there was a response.
    pub is_deserted: bool,
}

impl Progress {
    /// How long it has waited for an instance.
    pub fn queued(&self) -> Duration {
        self.waited.or(self.asked.map(|asked| asked.elapsed())).unwrap_or_default()
    }
}

/// Answers a request. Never fails: a failure becomes a response here.
pub async fn handle(
    tenants: &Tenants,
    connection: &Connection,
    id: RequestId,
    parts: &http::request::Parts,
    incoming: Incoming,
    progress: &mut Progress,
) -> Response<ResponseBody> {
    let mut observer = Observer { tenant: None, id, method: parts.method.clone() };
    let outcome = respond(tenants, connection, &mut observer, parts, incoming, progress).await;
    outcome.unwrap_or_else(|failure| {
        progress.is_deserted = failure == Failure::ClientGone;
        observer.ended(Err(failure));
        refusal(failure, id)
    })
}

/// The column of steps.
async fn respond(
    tenants: &Tenants,
    connection: &Connection,
    observer: &mut Observer,
    parts: &http::request::Parts,
    incoming: Incoming,
    progress: &mut Progress,
) -> Result<Response<ResponseBody>, Failure> {
    let tenant = tenants.route(environ::host(parts), parts.uri.path())?;
    observer.tenant = Some(Arc::clone(&tenant));
    progress.tenant = Some(Arc::clone(&tenant));
    tenant.admit()?;
    if let Some((mount, name)) = tenant.static_file(parts.uri.path()) {
        return Ok(static_file(mount, name, parts, observer.id).await);
    }
    let app = &tenant.app;
    let environ = environ::environ(parts, connection, &tenant.config.path)?;
    let mut body = RequestBody::new(incoming, &app.limits, &app.footprint)?;
    // Reading answers `Expect: 100-continue`, which is the app's to decide.
    let small = body.announced().filter(|length| *length <= INLINE_BODY);
    let small = small.filter(|_| !parts.headers.contains_key(header::EXPECT));
    // Before it waits for its body, or for an instance. Here a tenant whose
    // clients do not take what it sends is refused more.
    let cost = environ.len() as u64 + small.unwrap_or(0) + footprint::MESSAGE;
    let held = app.footprint.try_hold(cost).ok_or(Failure::MemoryExhausted)?;
    let inline = if small.is_some() { body.read_to_end().await? } else { Bytes::new() };
    // A client that speaks HTTP/1.0 knows no interim responses (RFC 9110
    // section 15.2), and hyper can not send them on HTTP/2.
    let hints = parts.extensions.get::<EarlyHints>().filter(|_| parts.version == Version::HTTP_11);
    let input = Input { environ, inline, held, body, hints: hints.cloned() };
    let mut running = run(app, observer.clone(), input, progress).await?;
    match poll_fn(|context| running.poll_first(context)).await? {
        First::Complete(mut head, rest, outcome) => {
            if let Some(outcome) = outcome {
                observer.ended(outcome);
            }
            // Whatever the guest still does, the client does not wait for it.
            running.detach();
            let held = head.held.take();
            Ok(head.into_response(ResponseBody::Complete { rest, held }))
        }
        First::Streaming(mut head) => {
            running.head = head.held.take();
            Ok(head.into_response(ResponseBody::Streaming(running)))
        }
        First::File(mut head, part) => {
            running.head = head.held.take();
            observer.ended(Ok(()));
            // The guest has no part in it any more; its instance comes free.
            running.detach();
            Ok(head.into_response(ResponseBody::File(part, running)))
        }
    }
}

/// Answers a request for the file `name` of a mount, without the app.
pub async fn static_file(
    mount: &Mount,
    name: &str,
    parts: &http::request::Parts,
    id: RequestId,
) -> Response<ResponseBody> {
    let status = match static_files::respond(mount, name, parts).await {
        Ok(response) => return response.map(ResponseBody::Static),
        Err(status) => status,
    };
    let reason = match status {
        StatusCode::SERVICE_UNAVAILABLE => "too many files are being sent",
        _ => "there is no such file",
    };
    let mut response = refusal(Failure::Refused(status, reason), id);
    // The request itself was fine.
    response.headers_mut().remove(header::CONNECTION);
    if status == StatusCode::METHOD_NOT_ALLOWED {
        response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
    }
    response
}

/// What a guest gets of a request.
struct Input {
    environ: Vec<u8>,
    /// The body, or as much as is there.
    inline: Bytes,
    /// Both, as a part of all that the tenant holds.
    held: Held,
    /// The rest of the body.
    body: RequestBody,
    hints: Option<EarlyHints>,
}

/// Takes an instance and sets it to work.
///
/// # Errors
///
/// If there is none to be had.
async fn run(
    app: &App,
    observer: Observer,
    input: Input,
    progress: &mut Progress,
) -> Result<Running, Failure> {
    let Input { environ, inline, held, body, hints } = input;
    let asked = Instant::now();
    progress.asked = Some(asked);
    let lease = app.pool.lease().await;
    let leased = Instant::now();
    progress.waited = Some(leased - asked);
    let mut lease = lease?;
    let clock = lease.instance().ok_or(Failure::CannotStart)?.clock();
    progress.leased = Some(leased);
    let (sender, events) = mpsc::channel(1);
    let method = observer.method.clone();
    let exchange = Exchange::new(body, sender, method, &app.limits, &app.footprint).with_hints(hints);
    let limits = (app.limits.timeout, app.limits.cpu);
    let call = call(lease, observer.id, (environ, inline, held), exchange, limits);
    let mut running = Running {
        call: Some(Box::pin(call)),
        share: Arc::clone(&app.share),
        is_in_background: false,
        clock,
        handed_at: None,
        events,
        observer,
        left: None,
        failed: None,
        head: None,
    };
    if app.share.is_ahead() {
        running.go_on_in_background();
    }
    Ok(running)
}

/// Who hears how a request ended.
#[derive(Clone)]
struct Observer {
    tenant: Option<Arc<Tenant>>,
    id: RequestId,
    method: Method,
}

impl Observer {
    /// Writes a failure to the log and tells the tenant.
    fn ended(&self, outcome: Result<(), Failure>) {
        let (request, method) = (self.id, &self.method);
        if let Some(tenant) = &self.tenant {
            tenant.note(request, outcome);
        }
        let Err(failure) = outcome else { return };
        let app = self.tenant.as_ref().map_or("-", |tenant| tenant.config.name.as_str());
        match self.tenant.as_ref().map_or(Some(0), |tenant| tenant.may_log()) {
            None => return,
            Some(0) => {}
            Some(dropped) => tracing::warn!(%app, "{dropped} failures were not logged: too many in a second"),
        }
        if failure.is_servers_fault() {
            tracing::error!(%app, %request, %method, "{failure}");
        } else {
            tracing::info!(%app, %request, %method, "{failure}");
        }
    }
}

/// Lets the leased instance answer, and gives it back if it is sound.
async fn call(
    mut lease: Lease,
    id: RequestId,
    (environ, body, _held): (Vec<u8>, Bytes, Held),
    exchange: Exchange,
    limits: (Duration, Option<Duration>),
) -> Result<Reply, Failure> {
    let instance = lease.instance().ok_or(Failure::CannotStart)?;
    let outcome = instance.handle(id, &environ, &body, exchange, limits).await;
    if !matches!(outcome, Err(Failure::Trap | Failure::Timeout)) {
        lease.give_back();
    }
    outcome
}

type Call = Pin<Box<dyn Future<Output = Result<Reply, Failure>> + Send>>;

/// A guest at work on a request.
///
/// Dropped while the guest is still at work, that is when the client is gone
/// or has the whole response, it lets the guest go on in a task of its own, so that
/// the app's `close()` runs. The guest's time limit holds there too.
pub struct Running {
    call: Option<Call>,
    share: Arc<Share>,
    /// Then `call` only waits for it.
    is_in_background: bool,
    clock: Clock,
    /// When hyper got a piece, until it asks for the next one: meanwhile the
    /// guest is not run, and its time does not pass.
    handed_at: Option<Instant>,
    events: mpsc::Receiver<Event>,
    observer: Observer,
    /// Bytes of the body that the head has announced and hyper did not get yet.
    left: Option<u64>,
    /// Why the response can not be completed, and whether hyper has had its
    /// chance to send what came before.
    failed: Option<(Failure, bool)>,
    /// What its head costs, for as long as there is more of the response.
    head: Option<Held>,
}

/// What a guest comes up with first.
enum First {
    /// A whole response, and what has become of the guest, if it has ended.
    Complete(Head, Bytes, Option<Result<(), Failure>>),
    Streaming(Head),
    File(Head, FilePart),
}

impl Running {
    /// Runs the guest until it has a whole response, or the head of one.
    fn poll_first(&mut self, context: &mut Context<'_>) -> Poll<Result<First, Failure>> {
        let done = self.poll_call(context);
        match (self.next_event(context), done) {
            (Some(Event::Whole(head, body)), done) => {
                let outcome = match done {
                    Poll::Ready(outcome) => Some(outcome.map(|_| ())),
                    Poll::Pending => None,
                };
                Poll::Ready(Ok(First::Complete(head, body, outcome)))
            }
            // A head that was sent is of no use if the guest has failed since.
            (_, Poll::Ready(Err(failure))) => Poll::Ready(Err(failure)),
            (Some(Event::Head(head)), _) => {
                self.left = head.content_length();
                Poll::Ready(Ok(First::Streaming(head)))
            }
            (Some(Event::File(head, part)), _) => Poll::Ready(Ok(First::File(head, part))),
            (_, Poll::Ready(Ok(Reply::Complete(head, body)))) => {
                Poll::Ready(Ok(First::Complete(head, body, Some(Ok(())))))
            }
            (_, Poll::Ready(Ok(Reply::Streamed))) => Poll::Ready(Err(Failure::App)),
            (_, Poll::Pending) => Poll::Pending,
        }
    }

    /// Runs the guest until the next piece of the body or its end.
    fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Failure>>> {
        if self.left == Some(0) {
            return Poll::Ready(None);
        }
        self.resume();
        loop {
            match self.next_event(context) {
                Some(Event::Chunk(chunk)) => {
                    // In the background the guest goes on.
                    self.handed_at = (self.call.is_some() && !self.is_in_background).then(Instant::now);
                    self.left = self.left.map(|left| left.saturating_sub(chunk.len() as u64));
                    // Else it is not asked for more before this is sent.
                    if self.left == Some(0) && self.call.is_none() && self.failed.is_none() {
                        self.observer.ended(Ok(()));
                    }
                    return Poll::Ready(Some(Ok(Frame::data(chunk))));
                }
                Some(Event::End) => {
                    self.observer.ended(Ok(()));
                    return Poll::Ready(None);
                }
                Some(Event::Head(_) | Event::Whole(..) | Event::File(..)) => continue,
                None => {}
            }
            match &mut self.failed {
                Some((failure, true)) => return Poll::Ready(Some(Err(*failure))),
                // hyper buffers. What the app sent before it failed goes out
                // first: hyper writes when a body has nothing ready.
                Some((_, flushed)) => {
                    *flushed = true;
                    context.waker().wake_by_ref();
                    return Poll::Pending;
                }
                None if self.call.is_none() => return Poll::Ready(None),
                None => {}
            }
            let was_in_background = self.is_in_background;
            match self.poll_call(context) {
                Poll::Ready(Err(failure)) => {
                    self.observer.ended(Err(failure));
                    // In the end hyper aborts the connection: the client can
                    // tell a broken body from a whole one.
                    self.failed = Some((failure, false));
                }
                Poll::Ready(Ok(_)) => {}
                // What it sends from now on wakes this task: `next_event` saw to
                // that. It may say that there is nothing although there is, if
                // the task has done so much that others come first.
                Poll::Pending if was_in_background => return Poll::Pending,
                Poll::Pending if !self.is_in_background && self.events.is_empty() => return Poll::Pending,
                // The guest has sent something before it had to wait, or it may
                // have done so in the background, where it has just gone.
                Poll::Pending => {}
            }
        }
    }

    fn poll_call(&mut self, context: &mut Context<'_>) -> Poll<Result<Reply, Failure>> {
        let Some(call) = &mut self.call else {
            return Poll::Pending;
        };
        let mut polled = call.as_mut().poll(context);
        // Also if its tenant is ahead only since this request began: many that begin
        // together would have all of this thread's time until each of them is long.
        if polled.is_pending()
            && !self.is_in_background
            && (scheduler::is_long(self.clock.cpu_used()) || self.share.is_ahead())
        {
            self.go_on_in_background();
            polled = self.call.as_mut().map_or(Poll::Pending, |call| call.as_mut().poll(context));
        }
        if polled.is_ready() {
            self.call = None;
        }
        polled
    }

    /// Takes what the guest has sent.
    fn next_event(&mut self, context: &mut Context<'_>) -> Option<Event> {
        if !self.is_in_background {
            // The guest sends only when it is polled here.
            return self.events.try_recv().ok();
        }
        match self.events.poll_recv(context) {
            Poll::Ready(event) => event,
            Poll::Pending => None,
        }
    }

    /// Gives the guest to the threads that are meant for those that compute for
    /// long. It goes on there until it has sent more than was taken.
    fn go_on_in_background(&mut self) {
        let Some(call) = self.call.take() else { return };
        let call = self.share.background().spawn(call);
        self.is_in_background = true;
        self.call = Some(Box::pin(async move {
            // It has panicked, or the server stops.
            call.await.unwrap_or_else(|error| {
                Err(if error.is_panic() { Failure::Trap } else { Failure::ClientGone })
            })
        }));
    }
}

impl Running {
    /// Gives the guest the time back in which it was not run.
    fn resume(&mut self) {
        if let Some(handed_at) = self.handed_at.take()
            && self.call.is_some()
        {
            self.clock.postpone(handed_at.elapsed());
        }
    }

    /// Lets the guest go on in a task of its own, if it is still at work.
    fn detach(&mut self) {
        self.resume();
        let Some(call) = self.call.take() else { return };
        // Closed, so that the guest's next write says that the client is gone.
        self.events.close();
        while self.events.try_recv().is_ok() {}
        let observer = self.observer.clone();
        // Without a runtime the process is ending.
        if tokio::runtime::Handle::try_current().is_ok() {
            self.share.background().spawn(async move {
                match call.await {
                    Ok(_) => observer.ended(Ok(())),
                    Err(Failure::App | Failure::ClientGone) => {}
                    Err(failure) => observer.ended(Err(failure)),
                }
            });
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.detach();
    }
}

/// The body of a response.
pub enum ResponseBody {
    /// All of it, or what is left.
    Complete {
        /// What hyper has not taken yet.
        rest: Bytes,
        /// What its head costs; `rest` counts by itself, also what hyper has
        /// taken and the client has not.
        held: Option<Held>,
    },
    /// What the guest still works on.
    Streaming(Running),
    /// A part of a file, and what tells whose it is.
    File(FilePart, Running),
    /// A file that the app was not asked for.
    Static(FileBody),
}

impl ResponseBody {
    /// What the head costs, if it is an app's, and the response around it.
    pub fn head(&mut self) -> Option<&mut Held> {
        match self {
            ResponseBody::Complete { held, .. } => held.as_mut(),
            ResponseBody::Streaming(running) | ResponseBody::File(_, running) => running.head.as_mut(),
            ResponseBody::Static(_) => None,
        }
    }

    /// Whether an app works on it whose tenant has had more than its part while others
    /// want to compute.
    pub fn is_ahead(&self) -> bool {
        match self {
            ResponseBody::Streaming(running) | ResponseBody::File(_, running) => running.share.is_ahead(),
            ResponseBody::Complete { .. } | ResponseBody::Static(_) => false,
        }
    }

    /// What the tenant holds whose response it is, if it is not our own.
    pub fn footprint(&self) -> Option<&Arc<Footprint>> {
        match self {
            ResponseBody::Complete { held, .. } => held.as_ref().map(Held::footprint),
            ResponseBody::Streaming(running) | ResponseBody::File(_, running) => {
                running.head.as_ref().map(Held::footprint)
            }
            ResponseBody::Static(file) => Some(file.footprint()),
        }
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = Failure;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Failure>>> {
        match self.get_mut() {
            ResponseBody::Complete { rest, .. } => {
                // In pieces, so that hyper holds few of a large body's bytes
                // when it drops the body.
                let piece = rest.split_to(rest.len().min(PIECE));
                Poll::Ready((!piece.is_empty()).then(|| Ok(Frame::data(piece))))
            }
            ResponseBody::Streaming(running) => running.poll_next(context),
            ResponseBody::File(part, running) => part.poll_next(context).map(|block| {
                Some(block?.map(Frame::data).map_err(|error| {
                    let failure = Failure::BadResponse("a file could not be read to its end");
                    tracing::debug!("a file could not be read to its end: {error}");
                    running.observer.ended(Err(failure));
                    failure
                }))
            }),
            ResponseBody::Static(file) => {
                file.poll_piece(context).map(|piece| piece.map(|piece| piece.map(Frame::data)))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            ResponseBody::Complete { rest, .. } => rest.is_empty(),
            ResponseBody::Streaming(running) => running.left == Some(0),
            ResponseBody::File(part, _) => part.left() == 0,
            ResponseBody::Static(file) => file.length() == 0,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            ResponseBody::Complete { rest, .. } => SizeHint::with_exact(rest.len() as u64),
            ResponseBody::Streaming(_) => SizeHint::default(),
            ResponseBody::File(part, _) => SizeHint::with_exact(part.left()),
            ResponseBody::Static(file) => SizeHint::with_exact(file.length()),
        }
    }
}

impl Head {
    fn into_response(self, body: ResponseBody) -> Response<ResponseBody> {
        let mut response = Response::new(body);
        *response.status_mut() = self.status;
        *response.headers_mut() = self.headers;
        if let Some(reason) = self.reason {
            response.extensions_mut().insert(reason);
        }
        response
    }
}

/// The response for a request that failed. Its text is ours: nothing of the
/// guest's is in it but the id under which the log has the rest.
pub fn refusal(failure: Failure, id: RequestId) -> Response<ResponseBody> {
    let status = failure.status();
    let reason = status.canonical_reason().unwrap_or("Error");
    let text = format!("{} {reason}\nrequest {id}\n", status.as_u16());
    let mut response = Response::new(ResponseBody::Complete { rest: text.into(), held: None });
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    if let Some(seconds) = failure.retry_after() {
        headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
    }
    if matches!(
        failure,
        Failure::BadRequest(_)
            | Failure::Refused(..)
            | Failure::BodyTooLarge
            | Failure::BodyTimeout
            | Failure::ClientGone
    ) {
        // What follows may not be the next request: the rest of the body is
        // still under way, or where it ends is in doubt.
        headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}
