//! The rules of HTTP/1.1 on the wire, where hyper is more lenient than
//! RFC 9112, and the rules for the target and `Host` of any request.
//!
//! [`Scan`] follows the bytes of a connection from head to body to head, and
//! approves them before hyper sees them. So the two can not disagree on where
//! a message ends, which is what request smuggling lives on. It looks at each
//! byte of a head once, and at none of a body but the lines around chunks.
//!
//! [`Frames`] follows the frames of an HTTP/2 connection, only to count those
//! that bring no request forward.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use http::header::{self, HeaderValue};
use http::request::Parts;
use http::{Method, StatusCode, Uri, Version};

use crate::failure::Failure;

/// Hexadecimal digits of a chunk size. More only serve to confuse.
const MAX_CHUNK_DIGITS: u32 = 16;
/// Bytes of chunk extensions in one body. Nobody uses them.
const MAX_EXTENSIONS: usize = 4 << 10;
/// Bytes of a method.
const MAX_METHOD: usize = 64;
/// Bytes of a request line besides the target.
const REST_OF_LINE: usize = MAX_METHOD + "  HTTP/1.1\r".len();
/// Empty lines before a request (RFC 9112 section 2.2 asks for one).
const MAX_EMPTY_LINES: u32 = 2;

/// What an HTTP/2 client sends first (RFC 9113 section 3.4).
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Frames of HTTP/2 without progress that a client may send at once, and in a
/// second. It is these that [`Frames`] counts.
const FRAMES_AT_ONCE: u64 = 1000;
const FRAMES_PER_SECOND: u64 = 100;
/// How many more it may send for each request, and for each piece of a response
/// and so many bytes of it: a client that takes a response grants windows.
pub const FRAMES_PER_REQUEST: u64 = 16;
pub const FRAMES_PER_PIECE: u64 = 4;
pub const BYTES_PER_FRAME: u64 = 512;

/// Bounds for the head of a request.
#[derive(Clone, Copy, Debug)]
pub struct HeadLimits {
    /// Bytes in all.
    pub bytes: usize,
    /// Header fields.
    pub fields: usize,
    /// Bytes of the target.
    pub target: usize,
}

/// Where a connection stands between its messages.
#[derive(Debug)]
pub struct Scan {
    limits: HeadLimits,
    state: State,
    /// Heads that were approved.
    heads: u64,
}

#[derive(Debug)]
enum State {
    Head(HeadScan),
    /// So many bytes of a body are still to come.
    Length(u64),
    Chunked(ChunkScan),
}

impl Scan {
    /// Starts before a request.
    pub fn new(limits: HeadLimits) -> Scan {
        Scan { limits, state: State::Head(HeadScan::default()), heads: 0 }
    }

    /// How many of `bytes` may pass. Those that may not are the beginning of a
    /// head; they must come again, with what follows them.
    ///
    /// # Errors
    ///
    /// The rule that is broken, and how many bytes before it may pass.
    pub fn approve(&mut self, bytes: &[u8]) -> Result<usize, (usize, Failure)> {
        let mut passed = 0;
        while passed < bytes.len() {
            let rest = &bytes[passed..];
            match &mut self.state {
                State::Head(head) => match head.scan(rest, &self.limits) {
                    Ok(None) => return Ok(passed),
                    Ok(Some((length, next))) => {
                        passed += length;
                        self.heads += 1;
                        self.state = next;
                    }
                    Err(failure) => return Err((passed, failure)),
                },
                State::Length(left) => {
                    let taken = rest.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
                    passed += taken;
                    *left -= taken as u64;
                    if *left == 0 {
                        self.state = State::Head(HeadScan::default());
                    }
                }
                State::Chunked(chunks) => {
                    let (taken, ended) =
                        chunks.scan(rest, &self.limits).map_err(|failure| (passed, failure))?;
                    passed += taken;
                    if ended {
                        self.state = State::Head(HeadScan::default());
                    }
                }
            }
        }
        Ok(passed)
    }

    /// Whether the next byte belongs to a head.
    pub fn in_head(&self) -> bool {
        matches!(self.state, State::Head(_))
    }

    /// Heads that were approved so far.
    pub fn heads(&self) -> u64 {
        self.heads
    }
}

/// A head as far as it was looked at.
#[derive(Debug, Default)]
struct HeadScan {
    /// Where the first line starts that is not yet complete.
    line: usize,
    /// Where the search for its end goes on.
    searched: usize,
    empty_lines: u32,
    fields: usize,
    has_request_line: bool,
    is_http_11: bool,
    length: Option<u64>,
    is_chunked: bool,
}

impl HeadScan {
    /// Goes on with `head`, which has all bytes since the head's first.
    /// Returns its length and what follows when it is complete.
    fn scan(&mut self, head: &[u8], limits: &HeadLimits) -> Result<Option<(usize, State)>, Failure> {
        while let Some(end) = head[self.searched..].iter().position(|byte| *byte == b'\n') {
            let end = self.searched + end;
            self.searched = end + 1;
            if end >= limits.bytes {
                return Err(self.too_large());
            }
            // RFC 9112 section 2.2 allows to take a bare LF for the end of a
            // line. Proxies that do not are why we do not.
            let line = head[self.line..end].strip_suffix(b"\r").ok_or(bad("a line ends without CR"))?;
            self.line = end + 1;
            if !self.has_request_line {
                if line.is_empty() {
                    self.empty_lines += 1;
                    if self.empty_lines > MAX_EMPTY_LINES {
                        return Err(bad("the request begins with empty lines"));
                    }
                    continue;
                }
                self.request_line(line, limits)?;
            } else if line.is_empty() {
                return Ok(Some((end + 1, self.body())));
            } else {
                self.field(line, limits)?;
            }
        }
        self.searched = head.len();
        if head.len() > limits.bytes {
            return Err(self.too_large());
        }
        if !self.has_request_line && head.len() - self.line > limits.target + REST_OF_LINE {
            return Err(Failure::Refused(StatusCode::URI_TOO_LONG, "the target is too long"));
        }
        Ok(None)
    }

    fn too_large(&self) -> Failure {
        if self.has_request_line {
            Failure::Refused(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, "the head has too many bytes")
        } else {
            Failure::Refused(StatusCode::URI_TOO_LONG, "the target is too long")
        }
    }

    /// RFC 9112 section 3: method SP target SP version, nothing else.
    fn request_line(&mut self, line: &[u8], limits: &HeadLimits) -> Result<(), Failure> {
        self.has_request_line = true;
        let mut parts = line.split(|byte| *byte == b' ');
        let (Some(method), Some(target), Some(version), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(bad("the request line is not method, target and version"));
        };
        if method.is_empty() || method.len() > MAX_METHOD || !is_token(method) {
            return Err(bad("the method is not a token"));
        }
        if target.len() > limits.target {
            return Err(Failure::Refused(StatusCode::URI_TOO_LONG, "the target is too long"));
        }
        // RFC 3986 has neither raw bytes above ASCII nor, in what is sent to
        // a server, a fragment. hyper lets the former through and cuts off the
        // latter, so that a proxy in front would see another path than the app.
        if target.is_empty() || !target.iter().all(|byte| byte.is_ascii_graphic() && *byte != b'#') {
            return Err(bad("the target has a character that must be encoded"));
        }
        // What hyper would refuse itself, with a response that is in no log.
        // Nearly all targets are plain, and not looked at twice.
        let is_plain = target[0] == b'/' && target.iter().all(|byte| IS_PLAIN[usize::from(*byte)]);
        if !is_plain && Uri::try_from(target).is_err() {
            return Err(bad("the target is not well-formed"));
        }
        match version {
            b"HTTP/1.1" => self.is_http_11 = true,
            b"HTTP/1.0" => {}
            [b'H', b'T', b'T', b'P', b'/', major, b'.', minor]
                if major.is_ascii_digit() && minor.is_ascii_digit() =>
            {
                return Err(Failure::Refused(
                    StatusCode::HTTP_VERSION_NOT_SUPPORTED,
                    "the version is not 1.0 or 1.1",
                ));
            }
            _ => return Err(bad("the version is not one of HTTP")),
        }
        Ok(())
    }

    fn field(&mut self, line: &[u8], limits: &HeadLimits) -> Result<(), Failure> {
        self.fields += 1;
        if self.fields > limits.fields {
            return Err(Failure::Refused(
                StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
                "the head has too many fields",
            ));
        }
        let (name, value) = split_field(line)?;
        match name.len() {
            14 if name.eq_ignore_ascii_case(b"content-length") => {
                // RFC 9112 section 6.3: hyper takes the same number twice for
                // one, and none beside Transfer-Encoding for no error.
                if self.length.is_some() {
                    return Err(bad("Content-Length is repeated"));
                }
                if self.is_chunked {
                    return Err(bad("both Content-Length and Transfer-Encoding are given"));
                }
                if value.is_empty() || !value.iter().all(u8::is_ascii_digit) {
                    return Err(bad("Content-Length is not a number"));
                }
                let number = str::from_utf8(value).ok().and_then(|digits| digits.parse().ok());
                let length: u64 = number.ok_or(bad("Content-Length is too large"))?;
                // hyper keeps the largest numbers for purposes of its own.
                self.length = Some(i64::try_from(length).map_err(|_| Failure::BodyTooLarge)?.unsigned_abs());
            }
            17 if name.eq_ignore_ascii_case(b"transfer-encoding") => {
                if self.is_chunked {
                    return Err(bad("Transfer-Encoding is repeated"));
                }
                if self.length.is_some() {
                    return Err(bad("both Content-Length and Transfer-Encoding are given"));
                }
                // RFC 9112 section 6.1.
                if !self.is_http_11 {
                    return Err(bad("HTTP/1.0 has no Transfer-Encoding"));
                }
                if !value.eq_ignore_ascii_case(b"chunked") {
                    return Err(unknown_coding(value));
                }
                self.is_chunked = true;
            }
            _ => {}
        }
        Ok(())
    }

    fn body(&self) -> State {
        match self.length {
            _ if self.is_chunked => State::Chunked(ChunkScan::default()),
            None | Some(0) => State::Head(HeadScan::default()),
            Some(length) => State::Length(length),
        }
    }
}

/// Takes a field line apart (RFC 9112 section 5): no space before the colon,
/// no folding, no control character in the value.
fn split_field(line: &[u8]) -> Result<(&[u8], &[u8]), Failure> {
    if line.starts_with(b" ") || line.starts_with(b"\t") {
        return Err(bad("a header line is folded"));
    }
    let colon = line.iter().position(|byte| *byte == b':').ok_or(bad("a header line has no colon"))?;
    let (name, value) = (&line[..colon], trim(&line[colon + 1..]));
    if name.is_empty() || !is_token(name) {
        return Err(bad("a header name is not a token"));
    }
    // No `any`: without an early end the compiler takes many bytes at a time.
    let has_control =
        value.iter().fold(false, |found, byte| found | (*byte < b' ' && *byte != b'\t') | (*byte == 0x7f));
    if has_control {
        return Err(bad("a header value has a control character"));
    }
    Ok((name, value))
}

/// Takes away space and tabs, and no other white space (RFC 9110 section 5.6.3).
fn trim(mut text: &[u8]) -> &[u8] {
    while let [b' ' | b'\t', rest @ ..] | [rest @ .., b' ' | b'\t'] = text {
        text = rest;
    }
    text
}

/// RFC 9112 section 6.1: a coding that we do not know is not implemented, and
/// one where `chunked` is not the last has no end.
fn unknown_coding(value: &[u8]) -> Failure {
    let last = value.rsplit(|byte| *byte == b',').next().map(trim);
    let codings = value.split(|byte| *byte == b',').map(trim);
    let is_list = codings.clone().all(|coding| !coding.is_empty() && is_token(coding));
    let chunked = codings.filter(|coding| coding.eq_ignore_ascii_case(b"chunked")).count();
    if is_list && chunked == 1 && last.is_some_and(|last| last.eq_ignore_ascii_case(b"chunked")) {
        Failure::Refused(StatusCode::NOT_IMPLEMENTED, "the transfer coding is not known")
    } else {
        bad("Transfer-Encoding is not chunked")
    }
}

/// The lines around the chunks of a body (RFC 9112 section 7.1). hyper takes
/// any number of leading zeros and space behind a size.
#[derive(Debug, Default)]
struct ChunkScan {
    at: ChunkPart,
    size: u64,
    digits: u32,
    /// Bytes of extensions so far, in all chunks.
    extensions: usize,
    /// Bytes and lines of trailers so far.
    trailers: usize,
    trailer_lines: usize,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum ChunkPart {
    #[default]
    Size,
    /// Space that only an extension may follow.
    Space,
    Extension,
    SizeLf,
    Data,
    DataCr,
    DataLf,
    /// The first byte of a trailer line.
    Trailer,
    TrailerName,
    TrailerValue,
    TrailerLf,
    EndLf,
}

impl ChunkScan {
    /// Goes on with `bytes`. Returns how many belong to the body, and whether
    /// it ends there.
    fn scan(&mut self, bytes: &[u8], limits: &HeadLimits) -> Result<(usize, bool), Failure> {
        let mut index = 0;
        while index < bytes.len() {
            if self.at == ChunkPart::Data {
                let left = bytes.len() - index;
                let taken = left.min(usize::try_from(self.size).unwrap_or(usize::MAX));
                self.size -= taken as u64;
                index += taken;
                if self.size == 0 {
                    self.at = ChunkPart::DataCr;
                }
                continue;
            }
            if self.step(bytes[index], limits)? {
                return Ok((index + 1, true));
            }
            index += 1;
        }
        Ok((index, false))
    }

    /// Takes one byte outside of data. True if it is the body's last.
    fn step(&mut self, byte: u8, limits: &HeadLimits) -> Result<bool, Failure> {
        self.at = match (self.at, byte) {
            (ChunkPart::Size, _) if byte.is_ascii_hexdigit() => {
                self.digits += 1;
                if self.digits > MAX_CHUNK_DIGITS {
                    return Err(bad("a chunk size has too many digits"));
                }
                let digit = char::from(byte).to_digit(16).unwrap_or_default();
                // Sixteen digits always fit.
                self.size = self.size << 4 | u64::from(digit);
                ChunkPart::Size
            }
            (ChunkPart::Size, _) if self.digits == 0 => return Err(bad("a chunk has no size")),
            (ChunkPart::Size, b'\r') | (ChunkPart::Extension, b'\r') => ChunkPart::SizeLf,
            (ChunkPart::Size | ChunkPart::Space, b';') => ChunkPart::Extension,
            (ChunkPart::Size | ChunkPart::Space, b' ' | b'\t') => self.extension(ChunkPart::Space)?,
            (ChunkPart::Extension, b'\t' | b' '..=b'~' | 0x80..) => self.extension(ChunkPart::Extension)?,
            (ChunkPart::SizeLf, b'\n') => {
                self.digits = 0;
                if self.size == 0 { ChunkPart::Trailer } else { ChunkPart::Data }
            }
            (ChunkPart::DataCr, b'\r') => ChunkPart::DataLf,
            (ChunkPart::DataLf, b'\n') => ChunkPart::Size,
            (ChunkPart::DataCr | ChunkPart::DataLf, _) => {
                return Err(bad("a chunk is not as long as its size says"));
            }
            (ChunkPart::Trailer, b'\r') => ChunkPart::EndLf,
            (ChunkPart::EndLf, b'\n') => return Ok(true),
            (ChunkPart::Trailer, b' ' | b'\t') => return Err(bad("a trailer line is folded")),
            (ChunkPart::TrailerValue, b'\r') => ChunkPart::TrailerLf,
            (ChunkPart::TrailerLf, b'\n') => {
                self.trailer_lines += 1;
                ChunkPart::Trailer
            }
            (ChunkPart::TrailerName, b':') => self.trailer(ChunkPart::TrailerValue, limits)?,
            (ChunkPart::Trailer | ChunkPart::TrailerName, _) if IS_TOKEN[usize::from(byte)] => {
                self.trailer(ChunkPart::TrailerName, limits)?
            }
            (ChunkPart::Trailer | ChunkPart::TrailerName, _) => {
                return Err(bad("a trailer line is not a name, a colon and a value"));
            }
            (ChunkPart::TrailerValue, b'\t' | b' '..=b'~' | 0x80..) => {
                self.trailer(ChunkPart::TrailerValue, limits)?
            }
            _ => return Err(bad("the lines of a chunked body are not well-formed")),
        };
        Ok(false)
    }

    fn trailer(&mut self, next: ChunkPart, limits: &HeadLimits) -> Result<ChunkPart, Failure> {
        self.trailers += 1;
        if self.trailers > limits.bytes.min(16 << 10) || self.trailer_lines >= limits.fields {
            return Err(Failure::Refused(
                StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
                "the trailers are too long",
            ));
        }
        Ok(next)
    }

    fn extension(&mut self, next: ChunkPart) -> Result<ChunkPart, Failure> {
        self.extensions += 1;
        if self.extensions > MAX_EXTENSIONS {
            return Err(bad("the chunk extensions are too long"));
        }
        Ok(next)
    }
}

/// Counts the frames of an HTTP/2 connection that bring no request forward:
/// PING, SETTINGS, PRIORITY, WINDOW_UPDATE and unknown ones. Each costs us
/// more than the client, and h2 answers any number of them. It has limits of
/// its own for the others: DATA, HEADERS, RST_STREAM and CONTINUATION.
#[derive(Debug)]
pub struct Frames {
    /// Bytes until the next frame's head: of the preface, or of a payload.
    skip: usize,
    head: [u8; 9],
    /// How much of the head is here.
    have: usize,
    /// Frames that may still come, and since when more are due.
    left: u64,
    since: Instant,
    is_spent: bool,
}

impl Frames {
    /// Starts before the preface.
    pub fn new() -> Frames {
        Frames {
            skip: PREFACE.len(),
            head: [0; 9],
            have: 0,
            left: FRAMES_AT_ONCE,
            since: Instant::now(),
            is_spent: false,
        }
    }

    /// Goes on with `bytes`. Takes out of `earned` what requests have brought
    /// in. Returns how many bytes may pass if the client has sent one frame
    /// too many: up to the end of that frame.
    pub fn follow(&mut self, bytes: &[u8], earned: &AtomicU64) -> Option<usize> {
        let mut at = 0;
        loop {
            let skipped = self.skip.min(bytes.len() - at);
            self.skip -= skipped;
            at += skipped;
            if self.skip == 0 && self.have == 0 && self.is_spent {
                return Some(at);
            }
            if at == bytes.len() {
                return None;
            }
            let taken = (self.head.len() - self.have).min(bytes.len() - at);
            self.head[self.have..self.have + taken].copy_from_slice(&bytes[at..at + taken]);
            self.have += taken;
            at += taken;
            if self.have < self.head.len() {
                return None;
            }
            self.have = 0;
            let [high, middle, low, kind, ..] = self.head;
            self.skip = u32::from_be_bytes([0, high, middle, low]) as usize;
            // DATA, HEADERS, RST_STREAM, CONTINUATION (RFC 9113 section 6).
            if !matches!(kind, 0 | 1 | 3 | 9) {
                self.count(earned);
            }
        }
    }

    fn count(&mut self, earned: &AtomicU64) {
        if self.left == 0 {
            let milliseconds = u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX);
            let due = (milliseconds.saturating_mul(FRAMES_PER_SECOND) / 1000).min(FRAMES_AT_ONCE);
            if due > 0 {
                self.since = Instant::now();
            }
            self.left = due.saturating_add(earned.swap(0, Ordering::Relaxed));
        }
        match self.left.checked_sub(1) {
            Some(left) => self.left = left,
            None => self.is_spent = true,
        }
    }
}

/// Checks what a request asks for, whatever the protocol it came by.
///
/// # Errors
///
/// The rule that is broken.
pub fn check_request(parts: &Parts, limits: &HeadLimits) -> Result<(), Failure> {
    if parts.method == Method::CONNECT {
        return Err(Failure::Refused(StatusCode::NOT_IMPLEMENTED, "CONNECT is for proxies"));
    }
    let target = parts.uri.path_and_query().map_or("", |target| target.as_str());
    if target.len() > limits.target {
        return Err(Failure::Refused(StatusCode::URI_TOO_LONG, "the target is too long"));
    }
    if parts.headers.len() > limits.fields {
        // HTTP/1.1 never gets here: its head was counted before.
        return Err(Failure::Refused(
            StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            "the head has too many fields",
        ));
    }
    // RFC 9112 section 3.2: origin-form, absolute-form, or `*` for OPTIONS.
    let is_asterisk = parts.method == Method::OPTIONS && target == "*";
    let is_authority_alone = target.is_empty() && parts.uri.scheme().is_some();
    if !(target.starts_with('/') || is_asterisk || is_authority_alone) {
        return Err(bad("the target is not a path"));
    }
    if parts.uri.scheme_str().is_some_and(|scheme| scheme != "http" && scheme != "https") {
        return Err(bad("the target's scheme is not http or https"));
    }
    if parts.version == Version::HTTP_2 {
        check_http2(parts)?;
    }
    check_host(parts)
}

/// What h2 lets through, and [`Scan`] does not.
fn check_http2(parts: &Parts) -> Result<(), Failure> {
    if parts.method.as_str().len() > MAX_METHOD {
        return Err(bad("the method is not a token"));
    }
    // RFC 9113 section 8.2.1.
    let is_blank = |byte: Option<&u8>| matches!(byte, Some(b' ' | b'\t'));
    let has_blanks =
        |value: &HeaderValue| is_blank(value.as_bytes().first()) || is_blank(value.as_bytes().last());
    if parts.headers.values().any(has_blanks) {
        return Err(bad("a header value has a blank at its end"));
    }
    // h2 takes the same number twice for one.
    if parts.headers.get_all(header::CONTENT_LENGTH).iter().nth(1).is_some() {
        return Err(bad("Content-Length is repeated"));
    }
    Ok(())
}

/// RFC 9112 section 3.2 and RFC 9113 section 8.3.1: one host, well-formed,
/// and the same in all places.
fn check_host(parts: &Parts) -> Result<(), Failure> {
    let mut hosts = parts.headers.get_all(header::HOST).iter();
    let host = hosts.next();
    if hosts.next().is_some() {
        return Err(bad("Host is repeated"));
    }
    let authority = parts.uri.authority().map(|authority| authority.as_str());
    if let Some(authority) = authority {
        if !is_host(authority.as_bytes()) {
            return Err(bad("the target's host is not well-formed"));
        }
        if host.is_some_and(|host| !host.as_bytes().eq_ignore_ascii_case(authority.as_bytes())) {
            return Err(bad("the target and Host name two hosts"));
        }
    }
    match host {
        Some(host) if !is_host(host.as_bytes()) => Err(bad("Host is not well-formed")),
        None if parts.version == Version::HTTP_11 => Err(bad("Host is missing")),
        None if parts.version == Version::HTTP_2 && authority.is_none() => Err(bad("Host is missing")),
        _ => Ok(()),
    }
}

/// RFC 3986 section 3.2: host and port, without user information. Nor with
/// `%`, by which a host could be written in more than one way.
pub fn is_host(text: &[u8]) -> bool {
    let (host, port) = match text {
        [b'[', rest @ ..] => {
            let Some(end) = rest.iter().position(|byte| *byte == b']') else { return false };
            let address = str::from_utf8(&rest[..end]).ok();
            if address.and_then(|text| text.parse::<std::net::Ipv6Addr>().ok()).is_none() {
                return false;
            }
            (None, &rest[end + 1..])
        }
        _ => {
            let end = text.iter().position(|byte| *byte == b':').unwrap_or(text.len());
            (Some(&text[..end]), &text[end..])
        }
    };
    let is_port = match port {
        [] => true,
        [b':', digits @ ..] => {
            digits.len() <= 5
                && digits.iter().all(u8::is_ascii_digit)
                && (digits.is_empty()
                    || str::from_utf8(digits).is_ok_and(|digits| digits.parse::<u16>().is_ok()))
        }
        _ => false,
    };
    is_port
        && host.is_none_or(|host| {
            !host.is_empty()
                && host.len() <= 255
                && host.iter().all(|byte| byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=".contains(byte))
        })
}

/// RFC 9110 section 5.6.2.
fn is_token(text: &[u8]) -> bool {
    text.iter().all(|byte| IS_TOKEN[usize::from(*byte)])
}

/// What RFC 3986 allows in a path and in a query.
static IS_PLAIN: [bool; 256] = {
    let mut table = [false; 256];
    let mut byte = 0;
    while byte < 128 {
        table[byte] = matches!(
            byte as u8,
            b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z' | b'-' | b'.' | b'_' | b'~' | b'!' | b'$' | b'&' | b'\''
                | b'(' | b')' | b'*' | b'+' | b',' | b';' | b'=' | b':' | b'@' | b'/' | b'?' | b'%'
        );
        byte += 1;
    }
    table
};

static IS_TOKEN: [bool; 256] = {
    let mut table = [false; 256];
    let mut byte = 0;
    while byte < 128 {
        table[byte] = matches!(
            byte as u8,
            b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z' | b'!' | b'#' | b'$' | b'%' | b'&' | b'\'' | b'*'
                | b'+' | b'-' | b'.' | b'^' | b'_' | b'`' | b'|' | b'~'
        );
        byte += 1;
    }
    table
};

fn bad(reason: &'static str) -> Failure {
    Failure::BadRequest(reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&length[1..], &[kind, 0, 0, 0, 0, 0], payload].concat()
    }

    #[test]
    fn frames_without_progress_are_counted_however_they_come_in() {
        let ping = frame(6, b"12345678");
        // What looks like frames within DATA is none.
        let data = frame(0, &ping.repeat(900));
        let limit = FRAMES_AT_ONCE as usize;
        let before = [PREFACE, &data, &ping.repeat(limit), &data].concat();
        let whole = [&before[..], &ping, &data, &ping].concat();
        for size in [1, 7, 9, 10, 4096, whole.len()] {
            let earned = AtomicU64::new(0);
            let mut frames = Frames::new();
            // Else some may have become due meanwhile.
            frames.since = Instant::now() + std::time::Duration::from_secs(3600);
            let mut passed = 0;
            for piece in whole.chunks(size) {
                match frames.follow(piece, &earned) {
                    None => passed += piece.len(),
                    Some(length) => {
                        passed += length;
                        break;
                    }
                }
            }
            assert_eq!(passed, before.len() + ping.len(), "in pieces of {size}");
        }
        let earned = AtomicU64::new(2);
        let mut frames = Frames::new();
        frames.since = Instant::now() + std::time::Duration::from_secs(3600);
        assert_eq!(frames.follow(&before, &earned), None);
        assert_eq!(frames.follow(&ping.repeat(2), &earned), None, "what was earned counts");
        assert_eq!(frames.follow(&ping, &earned), Some(ping.len()));
    }
}
