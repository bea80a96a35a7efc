//! Whether hyper reads what [`Scan`] has approved as `Scan` has understood it.
//!
//! A third reader, as plain as can be, says what is in the approved bytes. If
//! hyper sees another request than that, or an end elsewhere, a client could
//! hide one request in another.

use std::convert::Infallible;
use std::sync::atomic::AtomicBool;

use bytes::Bytes;
use http::Response;
use http_body_util::{BodyExt as _, Empty};
use proptest::collection::vec;
use proptest::prelude::*;
use tokio::io::AsyncWriteExt as _;

use super::*;
use crate::fuzz::{LIMITS, config, split, stream};

/// A request: the method, the path, and the body if it was whole.
type Seen = (String, String, Option<Vec<u8>>);

/// What hyper sees on a connection on which a client sends `pieces` and leaves,
/// and what it answers.
async fn converse(pieces: Vec<Vec<u8>>, buffer: usize) -> (Vec<Seen>, Vec<u8>, bool) {
    let limits = ConnectionLimits {
        header_timeout: Duration::from_secs(60),
        keep_alive: Duration::from_secs(60),
        requests: u64::MAX,
        client_idle: Duration::from_secs(60),
        head: LIMITS,
        streams: 1,
        resets: 1,
        lingerers: lingerers(),
    };
    let link = Link::new(false, u64::MAX, Connection::default(), false);
    let (ours, theirs) = tokio::io::duplex(buffer);
    let wire =
        Wire::new(Box::new(ours), BytesMut::new(), Some(Scan::new(LIMITS)), Arc::clone(&link), &limits);
    let seen = Mutex::new(Vec::new());
    let is_refused = AtomicBool::new(false);
    let service = service_fn(|request: Request<Incoming>| async {
        let (number, active) = link.begin();
        let (parts, body) = request.into_parts();
        if link.refusal(number).is_some() {
            is_refused.store(true, Ordering::Relaxed);
        } else {
            let body = body.collect().await.ok().map(|body| body.to_bytes().to_vec());
            seen.lock().unwrap().push((parts.method.to_string(), parts.uri.path().to_owned(), body));
        }
        drop(active);
        Ok::<_, Infallible>(Response::new(Empty::<Bytes>::new()))
    });
    let served = async {
        let mut builder = http1_builder(&limits);
        // The client leaves when it has sent all, and is answered all the same.
        builder.half_close(true);
        // How it ends is a matter of what was sent.
        let _ = builder.serve_connection(TokioIo::new(wire), service).await;
    };
    let (mut reader, mut writer) = tokio::io::split(theirs);
    let sent = async {
        for piece in pieces {
            // It may have been closed already.
            if writer.write_all(&piece).await.is_err() {
                break;
            }
            tokio::task::yield_now().await;
        }
        let _ = writer.shutdown().await;
    };
    let mut answers = Vec::new();
    let (_, (), _) = tokio::join!(served, sent, reader.read_to_end(&mut answers));
    (seen.into_inner().unwrap(), answers, is_refused.into_inner())
}

/// What `bytes` hold, which are the beginning of a stream that is well-formed,
/// and whether another request may follow. The last one has no body if that is
/// cut off.
fn read(mut bytes: &[u8]) -> (Vec<Seen>, bool) {
    let mut requests = Vec::new();
    loop {
        while let Some(rest) = bytes.strip_prefix(b"\r\n") {
            bytes = rest;
        }
        let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") else {
            return (requests, true);
        };
        let head = bytes[..end].iter().map(|byte| char::from(*byte)).collect::<String>();
        bytes = &bytes[end + 4..];
        let mut lines = head.split("\r\n");
        let first = lines.next().unwrap();
        let mut words = first.split(' ');
        let (method, target) = (words.next().unwrap().to_owned(), words.next().unwrap());
        let fields: Vec<_> = lines
            .map(|line| line.split_once(':').unwrap())
            .map(|(name, value)| (name.to_ascii_lowercase(), value.trim_matches([' ', '\t'])))
            .collect();
        let get = |wanted: &str| fields.iter().find(|(name, _)| name == wanted).map(|(_, value)| *value);
        let body = if get("transfer-encoding").is_some() {
            chunked(&mut bytes)
        } else {
            let length = get("content-length").map_or(0, |length| length.parse().unwrap());
            bytes.split_at_checked(length).map(|(body, rest)| {
                bytes = rest;
                body.to_vec()
            })
        };
        let is_cut = body.is_none();
        // hyper takes no option from a value that is not plain text.
        let is_text = |value: &str| value.chars().all(|char| matches!(char, '\t' | ' '..='~'));
        let options = fields.iter().filter(|(name, value)| name == "connection" && is_text(value));
        let options: Vec<_> = options.flat_map(|(_, value)| value.split(',')).map(str::trim).collect();
        let has = |word: &str| options.iter().any(|option| option.eq_ignore_ascii_case(word));
        // Not even hyper reads requests behind a CONNECT that was granted.
        let is_last =
            method == "CONNECT" || has("close") || (first.ends_with("HTTP/1.0") && !has("keep-alive"));
        requests.push((method, path(target).to_owned(), body));
        if is_cut || is_last {
            return (requests, false);
        }
    }
}

fn chunked(bytes: &mut &[u8]) -> Option<Vec<u8>> {
    let line = |bytes: &mut &[u8]| {
        let end = bytes.windows(2).position(|two| two == b"\r\n")?;
        let line = String::from_utf8_lossy(&bytes[..end]).into_owned();
        *bytes = &bytes[end + 2..];
        Some(line)
    };
    let mut body = Vec::new();
    loop {
        let size = line(bytes)?;
        let size = usize::from_str_radix(size.split(';').next()?.trim_end(), 16).unwrap();
        if size == 0 {
            while !line(bytes)?.is_empty() {}
            return Some(body);
        }
        body.extend_from_slice(bytes.get(..size)?);
        *bytes = bytes.get(size + 2..)?;
    }
}

/// The path of a target; a host alone has none.
fn path(target: &str) -> &str {
    let target = match target.split_once("://") {
        // A path may hold that too.
        _ if target.starts_with('/') || target == "*" => target,
        Some((_, rest)) => rest.find(['/', '?']).map_or("/", |start| &rest[start..]),
        None => return "",
    };
    match target.split('?').next() {
        Some("") | None => "/",
        Some(path) => path,
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn hyper_reads_the_requests_that_were_approved(
        bytes in stream(),
        cuts in vec(any::<prop::sample::Index>(), 0..6),
        buffer in prop_oneof![Just(1 << 16), 1usize..50],
    ) {
        let mut scan = Scan::new(LIMITS);
        let (approved, failure) = match scan.approve(&bytes) {
            Ok(approved) => (approved, None),
            Err((approved, failure)) => (approved, Some(failure)),
        };
        let (expected, is_open) = read(&bytes[..approved]);
        let pieces = split(&bytes, &cuts).into_iter().map(<[u8]>::to_vec).collect();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let (seen, answers, is_refused) = runtime.block_on(converse(pieces, buffer));
        prop_assert_eq!(&seen, &expected, "{}", String::from_utf8_lossy(&answers));
        prop_assert_eq!(is_refused, failure.is_some() && scan.in_head() && is_open, "{:?}", failure);
        // All answers are ours: hyper has nothing to complain about.
        let mut text = &*String::from_utf8_lossy(&answers);
        if expected.last().is_some_and(|(.., body)| body.is_none()) {
            // hyper does not finish the answer to a client that left in the middle of a body.
            text = text.rfind("\r\n\r\n").map_or("", |end| &text[..end + 4]);
        }
        let ours = [" 200 OK\r\n", " 100 Continue\r\n"].map(|line| text.matches(line).count());
        prop_assert_eq!(text.matches("HTTP/1.").count(), ours[0] + ours[1], "{}", text);
    }
}
