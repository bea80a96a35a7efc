//! The two streams of one request: the client's body on its way to the guest,
//! and the guest's response on its way to the client.

use std::error::Error as _;
use std::future::{Future as _, poll_fn};
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::header::{self, HeaderName, HeaderValue};
use http::{HeaderMap, Method, StatusCode};
use http_body::Body as _;
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use tokio::sync::mpsc;

use crate::early_hints::EarlyHints;
use crate::failure::Failure;
use crate::file_part::FilePart;
use crate::footprint::{self, Footprint, Held};
use crate::handler::RequestLimits;

/// A head larger than this is refused; common clients stop at 64 KiB or less.
const MAX_HEAD: usize = 128 << 10;
/// So is one with more fields than this.
const MAX_FIELDS: usize = 500;
/// What a field costs besides its bytes.
const FIELD: u64 = 128;

/// The head of a response.
#[derive(Debug)]
pub struct Head {
    /// The status code.
    pub status: StatusCode,
    /// The reason phrase, if it is not the usual one.
    pub reason: Option<hyper::ext::ReasonPhrase>,
    /// The header fields, checked.
    pub headers: HeaderMap,
    /// What it costs to keep, and the response around it.
    pub cost: u64,
    /// That, as a part of all that the tenant holds.
    pub held: Option<Held>,
}

impl Head {
    /// The length of the body that it announces.
    pub fn content_length(&self) -> Option<u64> {
        self.headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
    }
}

/// What a guest sends of a streamed response.
#[derive(Debug)]
pub enum Event {
    /// Status and headers; comes first.
    Head(Head),
    /// A whole response. Its bytes are held.
    Whole(Head, Bytes),
    /// A whole response: a head, and the part of a file that is its body.
    File(Head, FilePart),
    /// Bytes of the body, not empty. They are held.
    Chunk(Bytes),
    /// The body is complete.
    End,
}

/// A request body, from whatever the connection delivers.
#[derive(Debug)]
pub struct RequestBody {
    incoming: Option<Incoming>,
    /// What came with the last frame and was not asked for yet.
    buffered: Bytes,
    /// How many bytes the app's limit still allows.
    allowed: u64,
    /// How long the client may send nothing.
    idle: Duration,
    /// How many bytes it must send in a second, and what it has sent in which
    /// time. Only waiting for it counts.
    rate: u64,
    received: u64,
    waited: Duration,
    /// Why reading ended early, if it did.
    failure: Option<Failure>,
    /// What is buffered, as a part of all that the tenant holds.
    held: Option<Held>,
}

impl RequestBody {
    /// A body that is empty, for a request of our own.
    pub fn empty() -> RequestBody {
        RequestBody {
            incoming: None,
            buffered: Bytes::new(),
            allowed: 0,
            idle: Duration::ZERO,
            rate: 0,
            received: 0,
            waited: Duration::ZERO,
            failure: None,
            held: None,
        }
    }

    /// Wraps `incoming`, whose buffered bytes count for `footprint`.
    ///
    /// # Errors
    ///
    /// [`Failure::BodyTooLarge`] if its announced length exceeds the limit.
    pub fn new(
        incoming: Incoming,
        limits: &RequestLimits,
        footprint: &Arc<Footprint>,
    ) -> Result<RequestBody, Failure> {
        if incoming.size_hint().lower() > limits.body {
            return Err(Failure::BodyTooLarge);
        }
        let incoming = (!incoming.is_end_stream()).then_some(incoming);
        Ok(RequestBody {
            held: incoming.as_ref().map(|_| footprint.hold(0)),
            incoming,
            buffered: Bytes::new(),
            allowed: limits.body,
            idle: limits.client_idle,
            rate: limits.rate,
            received: 0,
            waited: Duration::ZERO,
            failure: None,
        })
    }

    /// The body's length if the client announced it.
    pub fn announced(&self) -> Option<u64> {
        self.incoming.as_ref().map_or(Some(0), |incoming| incoming.size_hint().exact())
    }

    /// The next bytes, at most `max`; empty at the end of the body.
    ///
    /// # Errors
    ///
    /// If the client is gone or silent, or the body exceeds its limit. Every
    /// later call fails in the same way.
    pub async fn read(&mut self, max: usize) -> Result<Bytes, Failure> {
        if let Some(failure) = self.failure {
            return Err(failure);
        }
        while self.buffered.is_empty() {
            let Some(incoming) = &mut self.incoming else {
                return Ok(Bytes::new());
            };
            let mut next = std::pin::pin!(incoming.frame());
            // What is there already costs no timer.
            let ready = poll_fn(|context| Poll::Ready(next.as_mut().poll(context))).await;
            let polled = match ready {
                Poll::Ready(frame) => Ok(frame),
                Poll::Pending => {
                    let start = Instant::now();
                    let patience = self.idle.min(time_left(self.rate, self.received, self.waited));
                    let frame = tokio::time::timeout(patience, next).await;
                    self.waited += start.elapsed();
                    frame
                }
            };
            let frame = match polled {
                Err(_) => return Err(self.fail(Failure::BodyTimeout)),
                Ok(None) => {
                    self.incoming = None;
                    return Ok(Bytes::new());
                }
                Ok(Some(Err(error))) => return Err(self.fail(reading_failed(&error))),
                Ok(Some(Ok(frame))) => frame,
            };
            // Trailers are dropped: CGI has no place for them.
            let Ok(data) = frame.into_data() else { continue };
            match self.allowed.checked_sub(data.len() as u64) {
                Some(allowed) => self.allowed = allowed,
                None => return Err(self.fail(Failure::BodyTooLarge)),
            }
            self.received += data.len() as u64;
            self.buffered = data;
        }
        let piece = self.buffered.split_to(self.buffered.len().min(max));
        if let Some(held) = &mut self.held {
            held.set(self.buffered.len() as u64);
        }
        Ok(piece)
    }

    /// The whole body, for one that is known to be small.
    ///
    /// # Errors
    ///
    /// As for [`RequestBody::read`].
    pub async fn read_to_end(&mut self) -> Result<Bytes, Failure> {
        let first = self.read(usize::MAX).await?;
        let second = self.read(usize::MAX).await?;
        if second.is_empty() {
            return Ok(first);
        }
        let mut whole = Vec::from(first);
        whole.extend_from_slice(&second);
        loop {
            let more = self.read(usize::MAX).await?;
            if more.is_empty() {
                return Ok(whole.into());
            }
            whole.extend_from_slice(&more);
        }
    }

    /// Why reading ended early, if it did.
    pub fn failure(&self) -> Option<Failure> {
        self.failure
    }

    fn fail(&mut self, failure: Failure) -> Failure {
        self.incoming = None;
        self.buffered = Bytes::new();
        self.held = None;
        self.failure = Some(failure);
        failure
    }
}

/// How long a client that has sent so much in so much time may send nothing
/// without falling below the rate. Every client has some seconds to begin.
fn time_left(rate: u64, received: u64, waited: Duration) -> Duration {
    const GRACE: Duration = Duration::from_secs(10);
    let Some(milliseconds) = received.saturating_mul(1000).checked_div(rate) else {
        return Duration::MAX;
    };
    // At least a moment, for what is in the kernel's buffers already.
    (GRACE + Duration::from_millis(milliseconds)).saturating_sub(waited).max(Duration::from_millis(1))
}

/// Why the body of a request could not be read.
fn reading_failed(error: &hyper::Error) -> Failure {
    let mut source = error.source();
    while let Some(cause) = source {
        // Ours, out of the check of what is on the wire.
        if let Some(cause) = cause.downcast_ref::<std::io::Error>() {
            let ours = cause.get_ref().and_then(|inner| inner.downcast_ref::<Failure>());
            if let Some(failure) = ours {
                return *failure;
            }
        }
        source = cause.source();
    }
    Failure::ClientGone
}

/// Where a guest stands with its response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Nothing was sent.
    Waiting,
    /// The head is out.
    Started,
    /// The body is complete.
    Finished,
    /// The guest broke a rule, or there is no memory for what it sent.
    Broken(Failure),
}

/// Both streams of the request that a guest works on.
#[derive(Debug)]
pub struct Exchange {
    /// The client's body.
    pub body: RequestBody,
    events: mpsc::Sender<Event>,
    /// The request's, which tells whether its response has a body.
    method: Method,
    phase: Phase,
    /// Bytes of the body that the head announced and that did not come yet.
    announced: Option<u64>,
    /// Bytes of the body that the app's limit still allows.
    allowed: u64,
    /// How long the client may take no byte.
    idle: Duration,
    footprint: Arc<Footprint>,
    /// How long the response may take once it has begun, and when it has to end.
    time: Duration,
    end: Option<Instant>,
    /// The way to send interim responses, if the client can take them.
    hints: Option<EarlyHints>,
}

/// Why the host takes no more of a response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SendError {
    /// The client is gone or too slow.
    ClientGone,
    /// The guest broke a rule, or the tenant may hold no more.
    Refused,
}

impl Exchange {
    /// Pairs `body` with the channel on which the response to `method` goes out
    /// within `limits`. What is on its way counts for `footprint`.
    pub fn new(
        body: RequestBody,
        events: mpsc::Sender<Event>,
        method: Method,
        limits: &RequestLimits,
        footprint: &Arc<Footprint>,
    ) -> Exchange {
        Exchange {
            body,
            events,
            method,
            phase: Phase::Waiting,
            announced: None,
            allowed: limits.response,
            idle: limits.client_idle,
            footprint: Arc::clone(footprint),
            time: limits.response_time,
            end: None,
            hints: None,
        }
    }

    /// Lets the guest send early hints by `hints`.
    pub fn with_hints(self, hints: Option<EarlyHints>) -> Exchange {
        Exchange { hints, ..self }
    }

    /// The guest sends early hints, as header lines.
    ///
    /// # Errors
    ///
    /// If a line breaks a rule or the head of the response is out, or the
    /// client is gone or too slow.
    pub async fn early_hints(&mut self, fields: &[u8]) -> Result<(), SendError> {
        if self.phase != Phase::Waiting {
            return Err(self.refuse("early hints came after the head of the response"));
        }
        let mut lines = Lines { rest: fields, left: MAX_HEAD };
        let mut checked = Vec::with_capacity(fields.len());
        while !lines.rest.is_empty() {
            match lines.next().and_then(|line| Ok((line, parse_field(line)?.0))) {
                Ok((_, name)) if name == header::CONTENT_LENGTH => {
                    return Err(self.refuse("early hints have no Content-Length"));
                }
                Ok((line, _)) => checked.extend_from_slice(line),
                Err(rule) => return Err(self.refuse(rule)),
            }
            checked.extend_from_slice(b"\r\n");
        }
        // What is sent before the response counts like what is in it.
        match self.allowed.checked_sub(checked.len() as u64) {
            Some(allowed) => self.allowed = allowed,
            None => return Err(self.refuse("its early hints are larger than the limit")),
        }
        let Some(hints) = &self.hints else { return Ok(()) };
        match tokio::time::timeout(self.idle, hints.send(&checked)).await {
            Ok(Ok(())) => Ok(()),
            _ => Err(SendError::ClientGone),
        }
    }

    /// Takes a whole response apart: its head, and the body that may follow it.
    /// Both are held from now on, wherever they wait: it may be that the client
    /// takes them late, or never.
    ///
    /// # Errors
    ///
    /// The rule that it breaks, or that the tenant may hold no more.
    pub fn whole(&self, response: Vec<u8>) -> Result<(Head, Bytes), Failure> {
        let (head, body) = parse_head(&response).map_err(Failure::BadResponse)?;
        let start = response.len() - body.len();
        let body = check_body(&head, &self.method, Bytes::from(response).slice(start..));
        let body = body.map_err(Failure::BadResponse)?;
        if body.len() as u64 > self.allowed {
            return Err(Failure::BadResponse("its body is larger than the limit"));
        }
        if body.is_empty() {
            return Ok((self.hold(head), body));
        }
        let held = self.footprint.try_hold(body.len() as u64).ok_or(Failure::MemoryExhausted)?;
        Ok((self.hold(head), held.tie(body)))
    }

    /// Counts a head from now on.
    fn hold(&self, head: Head) -> Head {
        Head { held: Some(self.footprint.hold(head.cost)), ..head }
    }

    /// The guest sends its whole response.
    ///
    /// # Errors
    ///
    /// If it breaks a rule or a head was sent before, or the client is gone.
    pub async fn send_whole(&mut self, response: Vec<u8>) -> Result<(), SendError> {
        if self.phase != Phase::Waiting {
            return Err(self.refuse("the head of a response was sent twice"));
        }
        match self.whole(response) {
            Ok((head, body)) => {
                self.phase = Phase::Finished;
                self.send(Event::Whole(head, body)).await
            }
            Err(failure) => Err(self.fail(failure)),
        }
    }

    /// The guest sends `part` of a file as its whole response.
    ///
    /// # Errors
    ///
    /// If the head breaks a rule or one was sent before, or the client is gone.
    pub async fn send_file(&mut self, head: &[u8], part: FilePart) -> Result<(), SendError> {
        if self.phase != Phase::Waiting {
            return Err(self.refuse("the head of a response was sent twice"));
        }
        match parse_head(head) {
            Ok(_) if part.left() > self.allowed => Err(self.refuse("its body is larger than the limit")),
            Ok((head, _)) if head.status == StatusCode::RESET_CONTENT => {
                Err(self.refuse("a response with status 205 has no body"))
            }
            Ok((head, [])) if head.content_length().is_none_or(|length| length == part.left()) => {
                self.phase = Phase::Finished;
                self.send(Event::File(self.hold(head), part)).await
            }
            Ok((_, [])) => Err(self.refuse("the body is not as long as Content-Length says")),
            Ok(_) => Err(self.refuse("bytes follow the head of a response")),
            Err(rule) => Err(self.refuse(rule)),
        }
    }

    /// The guest sends its head, as a CGI response head.
    ///
    /// # Errors
    ///
    /// If the head breaks a rule or one was sent before, or the client is gone.
    pub async fn start(&mut self, head: &[u8]) -> Result<(), SendError> {
        if self.phase != Phase::Waiting {
            return Err(self.refuse("the head of a response was sent twice"));
        }
        match parse_head(head) {
            Ok((head, [])) => {
                self.phase = Phase::Started;
                // hyper drops what follows the others that have none.
                if head.status == StatusCode::RESET_CONTENT {
                    self.allowed = 0;
                }
                self.end = Instant::now().checked_add(self.time);
                self.announced = head.content_length();
                self.send(Event::Head(self.hold(head))).await
            }
            Ok(_) => Err(self.refuse("bytes follow the head of a response")),
            Err(rule) => Err(self.refuse(rule)),
        }
    }

    /// The guest sends a piece of the body. Waits while the client is slow.
    ///
    /// # Errors
    ///
    /// If no head came before, or the client is gone or too slow.
    pub async fn write(&mut self, chunk: Vec<u8>) -> Result<(), SendError> {
        if self.phase != Phase::Started {
            return Err(self.refuse("a body was sent without a head before it"));
        }
        if chunk.is_empty() {
            return Ok(());
        }
        let length = chunk.len() as u64;
        match self.allowed.checked_sub(length) {
            Some(allowed) => self.allowed = allowed,
            None => return Err(self.refuse("its body is larger than the limit")),
        }
        if self.end.is_some_and(|end| end <= Instant::now()) {
            return Err(self.refuse("it took longer than the limit"));
        }
        self.send(Event::Chunk(self.footprint.hold(length).tie(chunk))).await?;
        self.announced = self.announced.map(|left| left.saturating_sub(length));
        Ok(())
    }

    /// The guest says that its body is complete.
    ///
    /// # Errors
    ///
    /// If no head came before, or the client is gone or too slow.
    pub async fn finish(&mut self) -> Result<(), SendError> {
        if self.phase != Phase::Started {
            return Err(self.refuse("a body was finished without a head before it"));
        }
        self.phase = Phase::Finished;
        match self.send(Event::End).await {
            // hyper drops a body as soon as it has as many bytes as the head
            // announced. Then nobody is there to hear of its end.
            Err(SendError::ClientGone) if self.announced == Some(0) => Ok(()),
            sent => sent,
        }
    }

    /// What the request came to when the guest has returned an empty list.
    ///
    /// # Errors
    ///
    /// If the response was not sent whole.
    pub fn conclude(self) -> Result<(), Failure> {
        match self.phase {
            Phase::Finished => Ok(()),
            Phase::Broken(failure) => Err(failure),
            Phase::Waiting | Phase::Started => Err(self.body.failure().unwrap_or(Failure::App)),
        }
    }

    /// Whether a byte of a streamed response went out.
    pub fn has_started(&self) -> bool {
        matches!(self.phase, Phase::Started | Phase::Finished)
    }

    async fn send(&mut self, event: Event) -> Result<(), SendError> {
        match self.events.try_send(event) {
            Ok(()) => Ok(()),
            Err(mpsc::error::TrySendError::Closed(_)) => Err(SendError::ClientGone),
            Err(mpsc::error::TrySendError::Full(event)) => {
                let left =
                    self.end.map_or(Duration::MAX, |end| end.saturating_duration_since(Instant::now()));
                match self.events.send_timeout(event, self.idle.min(left)).await {
                    Ok(()) => Ok(()),
                    Err(_) => Err(SendError::ClientGone),
                }
            }
        }
    }

    fn refuse(&mut self, rule: &'static str) -> SendError {
        self.fail(Failure::BadResponse(rule))
    }

    fn fail(&mut self, failure: Failure) -> SendError {
        // What a guest does after its first mistake is no news.
        if !matches!(self.phase, Phase::Broken(_)) {
            self.phase = Phase::Broken(failure);
        }
        SendError::Refused
    }
}

/// Takes a CGI response apart: the checked head, and the body behind it.
///
/// The adapter has checked all this by the rules of PEP 3333, with better
/// messages. It is checked again because the guest may not be our adapter.
///
/// # Errors
///
/// The rule that the head breaks.
pub fn parse_head(response: &[u8]) -> Result<(Head, &[u8]), &'static str> {
    let mut lines = Lines { rest: response, left: MAX_HEAD };
    let status =
        lines.next()?.strip_prefix(b"Status: ").ok_or("the first line is not `Status: NNN reason`")?;
    let (code, reason) = match status {
        [a, b, c, b' ', reason @ ..] => ([*a, *b, *c], reason),
        [a, b, c] => ([*a, *b, *c], &[][..]),
        _ => return Err("the status is not three digits and a reason"),
    };
    let status = StatusCode::from_bytes(&code).map_err(|_| "the status code is not valid")?;
    if !(200..600).contains(&status.as_u16()) {
        // 1xx is no final response (RFC 9110 section 15.2), and 600 and above
        // are not defined.
        return Err("the status code is not between 200 and 599");
    }
    let reason = match status.canonical_reason() {
        Some(usual) if usual.as_bytes() == reason => None,
        _ => Some(
            hyper::ext::ReasonPhrase::try_from(reason)
                .map_err(|_| "the reason phrase holds control characters")?,
        ),
    };
    let mut headers = HeaderMap::with_capacity(8);
    loop {
        let field = lines.next()?;
        if field.is_empty() {
            break;
        }
        let (name, value) = parse_field(field)?;
        if name == header::CONTENT_LENGTH {
            if headers.contains_key(&name) || !is_number(value.as_bytes()) {
                return Err("Content-Length is not one number");
            }
            if matches!(status, StatusCode::NO_CONTENT | StatusCode::RESET_CONTENT) {
                // RFC 9110 sections 8.6 and 15.3.6. Not removed later, which would change
                // the order of the others.
                continue;
            }
        }
        if headers.len() == MAX_FIELDS {
            return Err("the response has too many headers");
        }
        headers.append(name, value);
    }
    let bytes = (response.len() - lines.rest.len()) as u64;
    let cost = bytes + headers.len() as u64 * FIELD + footprint::MESSAGE;
    Ok((Head { status, reason, headers, cost, held: None }, lines.rest))
}

/// The lines of a head.
struct Lines<'a> {
    rest: &'a [u8],
    /// Bytes that the head may still have.
    left: usize,
}

impl<'a> Lines<'a> {
    /// The next line, without its end.
    fn next(&mut self) -> Result<&'a [u8], &'static str> {
        // No further than it may be: what follows can be large.
        let end = self.rest[..self.rest.len().min(self.left.saturating_add(2))]
            .windows(2)
            .position(|pair| pair == b"\r\n")
            .ok_or("the head is too long or has no end")?;
        let (line, rest) = (&self.rest[..end], &self.rest[end + 2..]);
        self.rest = rest;
        self.left = self.left.saturating_sub(end + 2);
        Ok(line)
    }
}

/// Takes a header line apart, and checks that an app may send it.
fn parse_field(field: &[u8]) -> Result<(HeaderName, HeaderValue), &'static str> {
    let colon = field.iter().position(|byte| *byte == b':').ok_or("a header line has no colon")?;
    let name = HeaderName::from_bytes(&field[..colon]).map_err(|_| "a header name is not a token")?;
    if is_hop_by_hop(&name) {
        return Err("a hop-by-hop header is the server's to send (PEP 3333)");
    }
    let value = HeaderValue::from_bytes(field[colon + 1..].trim_ascii())
        .map_err(|_| "a header value holds control characters")?;
    Ok((name, value))
}

/// Whether a response with this status has no body (RFC 9110 section 6.4.1, and
/// for 205 section 15.3.6).
pub fn has_no_body(status: StatusCode) -> bool {
    matches!(status, StatusCode::NO_CONTENT | StatusCode::RESET_CONTENT | StatusCode::NOT_MODIFIED)
}

/// The body that may follow `head`, out of what the guest sent as one.
///
/// # Errors
///
/// If its length is not the one that the head announces.
fn check_body(head: &Head, method: &Method, body: Bytes) -> Result<Bytes, &'static str> {
    if *method == Method::HEAD || has_no_body(head.status) {
        return Ok(Bytes::new());
    }
    match head.content_length() {
        Some(length) if length != body.len() as u64 => Err("the body is not as long as Content-Length says"),
        _ => Ok(body),
    }
}

/// The headers of a connection rather than of a response (RFC 9110 section
/// 7.6.1, and those of RFC 2616 section 13.5.1 to which PEP 3333 refers).
fn is_hop_by_hop(name: &HeaderName) -> bool {
    matches!(
        name.as_str(),
        "connection"
            | "keep-alive"
            | "proxy-authenticate"
            | "proxy-authorization"
            | "proxy-connection"
            | "te"
            | "trailer"
            | "trailers"
            | "transfer-encoding"
            | "upgrade"
    )
}

fn is_number(value: &[u8]) -> bool {
    !value.is_empty() && value.len() <= 19 && value.iter().all(u8::is_ascii_digit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_is_taken_apart() {
        let (head, body) = parse_head(
            b"Status: 200 OK\r\nContent-Type: text/plain\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2\r\nX-L: caf\xe9\r\n\r\n\r\nbody",
        )
        .unwrap();
        assert_eq!(head.status, 200);
        assert!(head.reason.is_none());
        assert_eq!(head.headers.get_all("set-cookie").iter().count(), 2);
        assert_eq!(head.headers["x-l"].as_bytes(), b"caf\xe9");
        assert_eq!(body, b"\r\nbody");
    }

    #[tokio::test]
    async fn a_response_counts_from_when_the_guest_has_sent_it() {
        let limits = RequestLimits {
            body: 0,
            response: 1 << 30,
            response_time: Duration::MAX,
            timeout: Duration::MAX,
            cpu: None,
            client_idle: Duration::MAX,
            rate: 0,
        };
        let footprint = Footprint::new(Some(200_000));
        let (sender, mut events) = mpsc::channel(1);
        let exchange =
            || Exchange::new(RequestBody::empty(), sender.clone(), Method::GET, &limits, &footprint);
        let response = [b"Status: 200 OK\r\n\r\n".to_vec(), vec![b'x'; 100_000]].concat();
        let mut first = exchange();
        first.send_whole(response.clone()).await.unwrap();
        // Nobody has taken it out of the channel.
        let held = footprint.held();
        assert!((100_000 + footprint::MESSAGE..110_000).contains(&held), "{held}");
        // What is returned counts, too, and there is no room for a second one.
        assert_eq!(exchange().whole(response.clone()).unwrap_err(), Failure::MemoryExhausted);
        let mut second = exchange();
        assert_eq!(second.send_whole(response).await, Err(SendError::Refused));
        assert_eq!(second.conclude(), Err(Failure::MemoryExhausted));
        assert_eq!(footprint.held(), held);
        let Some(Event::Whole(head, body)) = events.recv().await else { panic!("no response") };
        assert_eq!(footprint.held(), held, "counted once");
        drop((head, body, first));
        assert_eq!(footprint.held(), 0);
        let mut streamed = exchange();
        streamed.start(b"Status: 200 OK\r\n\r\n").await.unwrap();
        assert!(footprint.held() > footprint::MESSAGE);
        drop(events);
        assert_eq!(footprint.held(), 0);
    }

    #[test]
    fn an_unusual_reason_is_kept() {
        let (head, _) = parse_head(b"Status: 404 Nothing Here\r\n\r\n").unwrap();
        assert_eq!(head.reason.unwrap().as_bytes(), b"Nothing Here");
    }

    #[test]
    fn a_hostile_head_is_refused() {
        for head in [
            &b""[..],
            b"\r\n\r\n",
            b"Status: 200 OK",
            b"Status: 200 OK\r\n",
            b"Status: 200 OK\r\nX: y\r\n",
            b"HTTP/1.1 200 OK\r\n\r\n",
            b"Status: 2000 OK\r\n\r\n",
            b"Status: abc\r\n\r\n",
            b"Status: 100 Continue\r\n\r\n",
            b"Status: 101 Switching\r\n\r\n",
            b"Status: 999 No\r\n\r\n",
            b"Status: 200 O\0K\r\n\r\n",
            b"Status: 200 O\nK\r\n\r\n",
            b"Status: 200 OK\r\nno colon\r\n\r\n",
            b"Status: 200 OK\r\nBad Name: x\r\n\r\n",
            b"Status: 200 OK\r\n: x\r\n\r\n",
            b"Status: 200 OK\r\nX: a\nY: b\r\n\r\n",
            b"Status: 200 OK\r\nX: a\rY: b\r\n\r\n",
            b"Status: 200 OK\r\nX: a\0b\r\n\r\n",
            b"Status: 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"Status: 200 OK\r\nConnection: close\r\n\r\n",
            b"Status: 200 OK\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n",
            b"Status: 200 OK\r\nContent-Length: +1\r\n\r\n",
            b"Status: 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\n",
        ] {
            assert!(parse_head(head).is_err(), "{:?}", String::from_utf8_lossy(head));
        }
        let long = [b"Status: 200 OK\r\nX: ".to_vec(), vec![b'a'; MAX_HEAD], b"\r\n\r\n".to_vec()].concat();
        assert!(parse_head(&long).is_err());
        let many =
            [b"Status: 200 OK\r\n".to_vec(), b"X: y\r\n".repeat(MAX_FIELDS + 1), b"\r\n".to_vec()].concat();
        assert!(parse_head(&many).is_err());
    }

    #[test]
    fn a_body_fits_its_head() {
        let body = |head: &[u8], method: Method| {
            let (head, body) = parse_head(head).unwrap();
            check_body(&head, &method, Bytes::copy_from_slice(body))
        };
        assert_eq!(body(b"Status: 200 OK\r\n\r\nhi", Method::GET).unwrap(), "hi");
        assert_eq!(body(b"Status: 200 OK\r\nContent-Length: 2\r\n\r\nhi", Method::GET).unwrap(), "hi");
        assert!(body(b"Status: 200 OK\r\nContent-Length: 3\r\n\r\nhi", Method::GET).is_err());
        assert_eq!(body(b"Status: 200 OK\r\nContent-Length: 3\r\n\r\n", Method::HEAD).unwrap(), "");
        assert_eq!(body(b"Status: 304 Not Modified\r\n\r\nhi", Method::GET).unwrap(), "");
        for status in ["204 No Content", "205 Reset Content"] {
            let head = format!("Status: {status}\r\nContent-Length: 2\r\n\r\nhi");
            assert_eq!(body(head.as_bytes(), Method::GET).unwrap(), "", "{status}");
            assert!(parse_head(head.as_bytes()).unwrap().0.headers.is_empty(), "{status}");
        }
    }
}
