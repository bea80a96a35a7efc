//! Compression of responses, where the client and the response allow it.

use std::io::Write as _;
use std::task::{Context, Poll};

use bytes::Bytes;
use flate2::write::GzEncoder;
use http::header::{self, HeaderValue};
use http::{HeaderMap, Method, Response, StatusCode};
use http_body::Frame;

use crate::exchange::has_no_body;
use crate::failure::Failure;
use crate::footprint::Held;
use crate::front::Kind;

/// Shorter bodies do not become shorter.
const LEAST: u64 = 256;
/// Bytes compressed at a time, so that other connections get their turn.
const STEP: usize = 64 << 10;
/// Levels for content that is compressed for one client only.
const GZIP_LEVEL: u32 = 5;
const BROTLI_LEVEL: u32 = 4;
/// Two to the power of this is a stream's window.
const BROTLI_WINDOW: u32 = 18;

/// What an encoder has at most of tables, windows and output that is not yet handed
/// on: 485 KiB were measured.
const GZIP_MEMORY: u64 = 512 << 10;
/// The same for brotli, with these levels: 3.6 MiB.
const BROTLI_MEMORY: u64 = 4 << 20;
/// For bodies that are known to be no longer than this, it is 815 KiB.
const SHORT: u64 = 16 << 10;
const SHORT_BROTLI_MEMORY: u64 = 1 << 20;

/// The encodings that a client takes, with weights from 0 to 1000.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Accepted {
    brotli: u16,
    gzip: u16,
}

impl Accepted {
    /// Reads `Accept-Encoding` (RFC 9110 section 12.5.3).
    pub fn by(headers: &HeaderMap) -> Accepted {
        let (mut brotli, mut gzip, mut any) = (None, None, None);
        let values = headers.get_all(header::ACCEPT_ENCODING).iter();
        for element in values.filter_map(|value| value.to_str().ok()).flat_map(|value| value.split(',')) {
            let mut parts = element.split(';').map(str::trim);
            let coding = parts.next().unwrap_or_default();
            let weight = parts.find_map(|part| part.strip_prefix("q=").or(part.strip_prefix("Q=")));
            let weight = match weight.map(str::parse::<f32>) {
                None => 1000,
                // Whatever it is: a cast keeps it in range, and NaN becomes 0.
                #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped")]
                Some(Ok(weight)) => (weight * 1000.0).clamp(0.0, 1000.0) as u16,
                Some(Err(_)) => 0,
            };
            match coding {
                "*" => any = Some(weight),
                coding if coding.eq_ignore_ascii_case("br") => brotli = Some(weight),
                coding if coding.eq_ignore_ascii_case("gzip") => gzip = Some(weight),
                _ => {}
            }
        }
        Accepted { brotli: brotli.or(any).unwrap_or(0), gzip: gzip.or(any).unwrap_or(0) }
    }

    /// The encodings that are accepted, the better first, each with the
    /// suffix that files in it have.
    pub fn in_order(self) -> impl Iterator<Item = (&'static str, &'static str)> {
        let (br, gzip) = (("br", ".br", self.brotli), ("gzip", ".gz", self.gzip));
        let order = if self.gzip > self.brotli { [gzip, br] } else { [br, gzip] };
        order.into_iter().filter(|(_, _, weight)| *weight > 0).map(|(coding, suffix, _)| (coding, suffix))
    }
}

/// Compresses `response` if it may be.
pub fn apply(method: &Method, request: &HeaderMap, mut response: Response<Kind>) -> Response<Kind> {
    if response.status() == StatusCode::NOT_MODIFIED {
        weaken_as_named(request, response.headers_mut());
    }
    if !may_compress(&response) {
        return response;
    }
    // What is sent depends on this, whatever it says now.
    add_vary(response.headers_mut());
    let mut codings = Accepted::by(request).in_order().map(|(coding, _)| coding);
    let (coding, held) = if *method == Method::HEAD {
        // As the answer to GET says, where there is memory.
        let Some(coding) = codings.next() else { return response };
        (coding, None)
    } else {
        let Some(footprint) = response.body().footprint() else { return response };
        let length = response.body().length();
        let fits = |coding| {
            // As for instances: what is to be left for requests is not for this.
            let mut held = footprint.hold(0);
            held.grow(memory(coding, length)).then_some((coding, Some(held)))
        };
        // Where there is none for any, what was made goes out as it is.
        let Some(chosen) = codings.find_map(fits) else { return response };
        chosen
    };
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static(coding));
    headers.remove(header::CONTENT_LENGTH);
    headers.remove(header::ACCEPT_RANGES);
    // Other bytes than those that a strong tag stands for.
    if let Some(weak) = weak_tag(headers) {
        headers.insert(header::ETAG, weak);
    }
    let Some(held) = held else { return response };
    response.map(|body| {
        let is_live = body.is_live();
        Kind::Compressed(Box::new(Compressed {
            body,
            rest: Bytes::new(),
            encoder: Encoder::new(coding),
            held,
            is_live,
        }))
    })
}

/// The weak form of the tag, if it is a strong one.
fn weak_tag(headers: &HeaderMap) -> Option<HeaderValue> {
    let tag = headers.get(header::ETAG)?.as_bytes();
    if tag.starts_with(b"W/") { None } else { HeaderValue::from_bytes(&[b"W/", tag].concat()).ok() }
}

/// A 304 has the tag that the response had which the client keeps: the weak
/// one, if that was compressed (RFC 9110 section 15.4.5).
fn weaken_as_named(request: &HeaderMap, headers: &mut HeaderMap) {
    let Some(weak) = weak_tag(headers) else { return };
    let mut named = request.get_all(header::IF_NONE_MATCH).iter().map(HeaderValue::as_bytes);
    if named.any(|tags| tags.windows(weak.len()).any(|tag| tag == weak.as_bytes())) {
        headers.insert(header::ETAG, weak);
        add_vary(headers);
    }
}

/// Says that what is sent depends on what the client accepts.
fn add_vary(headers: &mut HeaderMap) {
    let varies = headers.get_all(header::VARY).iter();
    let is_said = varies
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|name| name.trim() == "*" || name.trim().eq_ignore_ascii_case("accept-encoding"));
    if !is_said {
        headers.append(header::VARY, HeaderValue::from_static("accept-encoding"));
    }
}

fn may_compress(response: &Response<Kind>) -> bool {
    let headers = response.headers();
    let text = |name| headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok());
    let has_body = !has_no_body(response.status()) && response.status() != StatusCode::PARTIAL_CONTENT;
    let mut rules = headers.get_all(header::CACHE_CONTROL).iter().filter_map(|value| value.to_str().ok());
    let is_forbidden =
        rules.any(|rules| rules.split(',').any(|rule| rule.trim().eq_ignore_ascii_case("no-transform")));
    let announced = text(header::CONTENT_LENGTH).and_then(|length| length.parse().ok());
    let is_long = announced.or(response.body().length()).is_none_or(|length| length >= LEAST);
    has_body
        && is_long
        && !is_forbidden
        && !headers.contains_key(header::CONTENT_ENCODING)
        && !headers.contains_key(header::CONTENT_RANGE)
        && text(header::CONTENT_TYPE).is_some_and(is_compressible)
}

/// Whether a media type is text. Images and archives are compressed already,
/// and who reads an event stream wants each event at once, through proxies
/// that know nothing of compression.
fn is_compressible(media_type: &str) -> bool {
    let essence = media_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    match essence.as_str() {
        "text/event-stream" => false,
        "application/javascript"
        | "application/json"
        | "application/xml"
        | "application/wasm"
        | "image/svg+xml"
        | "application/x-ndjson" => true,
        essence => essence.starts_with("text/") || essence.ends_with("+json") || essence.ends_with("+xml"),
    }
}

/// A body that is compressed as it comes.
pub struct Compressed {
    body: Kind,
    /// What has come and is not yet compressed.
    rest: Bytes,
    encoder: Option<Encoder>,
    /// What the encoder has.
    held: Held,
    is_live: bool,
}

enum Encoder {
    Gzip(GzEncoder<Vec<u8>>),
    Brotli(Box<brotli::CompressorWriter<Vec<u8>>>),
}

/// What it takes at most to compress so many bytes.
fn memory(coding: &str, length: Option<u64>) -> u64 {
    match (coding, length) {
        ("br", Some(..=SHORT)) => SHORT_BROTLI_MEMORY,
        ("br", _) => BROTLI_MEMORY,
        _ => GZIP_MEMORY,
    }
}

impl Encoder {
    fn new(coding: &str) -> Option<Encoder> {
        Some(match coding {
            "br" => Encoder::Brotli(Box::new(brotli::CompressorWriter::new(
                Vec::new(),
                4096,
                BROTLI_LEVEL,
                BROTLI_WINDOW,
            ))),
            _ => Encoder::Gzip(GzEncoder::new(Vec::new(), flate2::Compression::new(GZIP_LEVEL))),
        })
    }

    /// Compresses `bytes`, and with `flush` gives out all of them.
    fn push(&mut self, bytes: &[u8], flush: bool) -> std::io::Result<Vec<u8>> {
        match self {
            Encoder::Gzip(encoder) => {
                encoder.write_all(bytes)?;
                if flush {
                    encoder.flush()?;
                }
                Ok(std::mem::take(encoder.get_mut()))
            }
            Encoder::Brotli(encoder) => {
                encoder.write_all(bytes)?;
                if flush {
                    encoder.flush()?;
                }
                Ok(std::mem::take(encoder.get_mut()))
            }
        }
    }

    fn finish(self) -> std::io::Result<Vec<u8>> {
        match self {
            Encoder::Gzip(encoder) => encoder.finish(),
            Encoder::Brotli(encoder) => Ok(encoder.into_inner()),
        }
    }
}

impl Compressed {
    /// What is compressed.
    pub fn body(&mut self) -> &mut Kind {
        &mut self.body
    }

    /// A piece that counts until the client has it.
    fn handed_on(&self, piece: Vec<u8>) -> Frame<Bytes> {
        Frame::data(self.held.footprint().hold(piece.len() as u64).tie(piece))
    }

    /// The next piece.
    pub fn poll_piece(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Failure>>> {
        const BROKEN: Failure = Failure::BadResponse("the body could not be compressed");
        loop {
            let Some(encoder) = &mut self.encoder else { return Poll::Ready(None) };
            if self.rest.is_empty() {
                match self.body.poll_piece(context) {
                    Poll::Pending => return Poll::Pending,
                    Poll::Ready(Some(Err(failure))) => return Poll::Ready(Some(Err(failure))),
                    Poll::Ready(Some(Ok(frame))) => {
                        self.rest = frame.into_data().unwrap_or_default();
                        continue;
                    }
                    Poll::Ready(None) => {
                        let last = self.encoder.take().map(Encoder::finish);
                        return Poll::Ready(match last {
                            Some(Ok(last)) if last.is_empty() => None,
                            Some(Ok(last)) => Some(Ok(self.handed_on(last))),
                            _ => Some(Err(BROKEN)),
                        });
                    }
                }
            }
            let step = self.rest.split_to(self.rest.len().min(STEP));
            // A piece that the app has sent goes out before it is asked for
            // the next, as PEP 3333 wants.
            let flush = self.is_live && self.rest.is_empty();
            match encoder.push(&step, flush) {
                Ok(piece) if piece.is_empty() => {}
                Ok(piece) => return Poll::Ready(Some(Ok(self.handed_on(piece)))),
                Err(_) => return Poll::Ready(Some(Err(BROKEN))),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::footprint::Footprint;
    use crate::handler::ResponseBody;

    #[test]
    fn weights_decide_and_zero_forbids() {
        let of = |text: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static(text));
            Accepted::by(&headers).in_order().map(|(coding, _)| coding).collect::<Vec<_>>()
        };
        assert_eq!(of("gzip, deflate, br"), ["br", "gzip"]);
        assert_eq!(of("gzip;q=1.0, br;q=0.5"), ["gzip", "br"]);
        assert_eq!(of("GZIP"), ["gzip"]);
        assert_eq!(of("br;q=0, *"), ["gzip"]);
        assert_eq!(of("gzip;q=x, br; q=nan"), [""; 0]);
        assert_eq!(of("identity"), [""; 0]);
        assert_eq!(Accepted::by(&HeaderMap::new()).in_order().count(), 0);
    }

    #[test]
    fn an_encoder_counts_and_what_it_has_no_room_for_is_sent_as_it_is() {
        let of = |length: usize, limit, accepted: &'static str| {
            let footprint = Footprint::new(Some(limit));
            let rest = Bytes::from(vec![b'a'; length]);
            let body = ResponseBody::Complete { rest, held: Some(footprint.hold(0)) };
            let mut response = Response::new(Kind::App(body));
            response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
            let mut request = HeaderMap::new();
            request.insert(header::ACCEPT_ENCODING, HeaderValue::from_static(accepted));
            let mut response = apply(&Method::GET, &request, response);
            assert_eq!(response.headers()[header::VARY], "accept-encoding");
            let coding = response.headers().get(header::CONTENT_ENCODING);
            let coding = coding.map_or("", |coding| coding.to_str().unwrap()).to_owned();
            let held = footprint.held();
            // Pieces count, whoever has them, and the encoder as long as there are more.
            let mut context = Context::from_waker(std::task::Waker::noop());
            let mut pieces = Vec::new();
            while let Poll::Ready(Some(piece)) = response.body_mut().poll_piece(&mut context) {
                pieces.push(piece.unwrap().into_data().unwrap());
            }
            drop(response);
            let left: usize = pieces.iter().map(Bytes::len).sum();
            assert_eq!(footprint.held(), if coding.is_empty() { 0 } else { left as u64 });
            drop(pieces);
            assert_eq!(footprint.held(), 0);
            (coding, held)
        };
        let of = |length, limit, accepted| {
            let (coding, held) = of(length, limit, accepted);
            (coding.leak() as &str, held)
        };
        assert_eq!(of(1000, u64::MAX, "br, gzip"), ("br", SHORT_BROTLI_MEMORY));
        assert_eq!(of(100_000, u64::MAX, "br, gzip"), ("br", BROTLI_MEMORY));
        assert_eq!(of(100_000, BROTLI_MEMORY, "br, gzip"), ("gzip", GZIP_MEMORY));
        assert_eq!(of(100_000, BROTLI_MEMORY, "br"), ("", 0));
        assert_eq!(of(100_000, GZIP_MEMORY, "br, gzip"), ("", 0));
    }

    fn response(status: u16, headers: &[(&'static str, &'static str)]) -> Response<Kind> {
        let body = ResponseBody::Complete { rest: Bytes::from(vec![b'a'; 1000]), held: None };
        let mut response = Response::builder().status(status);
        for (name, value) in headers {
            response = response.header(*name, *value);
        }
        response.body(Kind::App(body)).unwrap()
    }

    #[test]
    fn one_rule_of_several_lines_forbids() {
        let text = ("content-type", "text/plain");
        assert!(may_compress(&response(200, &[text, ("cache-control", "private")])));
        let two = [text, ("cache-control", "private"), ("cache-control", "max-age=5, No-Transform")];
        assert!(!may_compress(&response(200, &two)));
        for status in [204, 205, 206, 304] {
            assert!(!may_compress(&response(status, &[text])), "{status}");
        }
    }

    #[test]
    fn a_tag_that_is_known_is_the_one_that_was_sent() {
        let of = |asked: &'static str| {
            let mut request = HeaderMap::new();
            request.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("gzip"));
            request.append(header::IF_NONE_MATCH, HeaderValue::from_static("\"other\""));
            request.append(header::IF_NONE_MATCH, HeaderValue::from_static(asked));
            let answer = apply(&Method::GET, &request, response(304, &[("etag", "\"a\"")]));
            answer.headers()[header::ETAG].to_str().unwrap().to_owned()
        };
        assert_eq!(of("W/\"a\""), "W/\"a\"");
        assert_eq!(of("\"a\""), "\"a\"");
        assert_eq!(of("*"), "\"a\"");
    }

    #[test]
    fn only_text_is_compressed() {
        for yes in
            ["text/html; charset=utf-8", "application/json", "application/problem+json", "image/svg+xml"]
        {
            assert!(is_compressible(yes), "{yes}");
        }
        for no in ["text/event-stream", "image/png", "application/octet-stream", "application/zip", ""] {
            assert!(!is_compressible(no), "{no}");
        }
    }
}
