//! Random input for what stands between the network and an app.
//!
//! A usual test run makes a few hundred cases of each property, `just fuzz`
//! as many as it is told. `connection` has one more: that hyper reads the same
//! requests out of the bytes that [`wire`](crate::wire) has approved. What is
//! found becomes a case of an ordinary test, with the rule that it breaks.

use std::net::{IpAddr, SocketAddr};

use http::header::{HeaderName, HeaderValue};
use http::{HeaderMap, Request};
use proptest::collection::vec;
use proptest::prelude::*;

use crate::environ::{Connection, environ, path_info, script_name};
use crate::exchange::parse_head;
use crate::failure::Failure;
use crate::forwarded::{Dialect, Proxies};
use crate::proxy_protocol::{self, Header};
use crate::wire::{self, HeadLimits, Scan, is_host};

/// As many cases as `PROPTEST_CASES` says. A case that fails is printed, and
/// belongs into a test of its own.
pub fn config() -> ProptestConfig {
    ProptestConfig {
        failure_persistence: None,
        max_local_rejects: u32::MAX,
        max_global_rejects: u32::MAX,
        ..ProptestConfig::default()
    }
}

/// Small limits, so that random input meets them.
pub const LIMITS: HeadLimits = HeadLimits { bytes: 1000, fields: 12, target: 100 };

/// What requests are made of, whole and in parts, right and wrong.
const PIECES: &[&[u8]] = &[
    b"GET / HTTP/1.1\r\n",
    b"POST /a?b HTTP/1.1\r\n",
    b"PUT /x HTTP/1.0\r\n",
    b"OPTIONS * HTTP/1.1\r\n",
    b"GET http://x/y HTTP/1.1\r\n",
    b"CONNECT x:1 HTTP/1.1\r\n",
    b"HEAD",
    b"HTTP/1.1",
    b"HTTP/1.2",
    b"Host: x\r\n",
    b"Content-Length: 0\r\n",
    b"Content-Length: 5\r\n",
    b"content-length:5\r\n",
    b"Content-Length: 005\r\n",
    b"Content-Length: ",
    b"Transfer-Encoding: chunked\r\n",
    b"transfer-encoding:\tCHUNKED \r\n",
    b"Transfer-Encoding: gzip, chunked\r\n",
    b"Transfer-Encoding:",
    b"chunked",
    b"Connection: close\r\n",
    b"Connection: keep-alive\r\n",
    b"Expect: 100-continue\r\n",
    b"Upgrade: h2c\r\n",
    b"X: \xe9\r\n",
    b"X",
    b":",
    b";",
    b"\r\n",
    b"\r\n\r\n",
    b"\n",
    b"\r",
    b" ",
    b"\t",
    b"\0",
    b"#",
    b"%00",
    b"\xff",
    b"\x0b",
    b"0",
    b"5",
    b"A",
    b"1\r\nx\r\n",
    b"5\r\nhello\r\n",
    b"5;a=b\r\nhello\r\n",
    b"05 ;a=\"b\"\r\nhello\r\n",
    b"0\r\n\r\n",
    b"0\r\nTrailer: x\r\n\r\n",
    b"hello",
    b"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
];

fn piece() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        8 => proptest::sample::select(PIECES).prop_map(<[u8]>::to_vec),
        1 => vec(any::<u8>(), 1..4),
    ]
}

/// A target that is all right, mostly.
fn target() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        Just(b"/".to_vec()),
        "/[!-~]{0,20}".prop_map(String::into_bytes),
        "/[a-z%?&=./]{0,130}".prop_map(String::into_bytes),
        "(http|HTTPS|ftp)://[a-z.:0-9@]{0,10}(/[a-z]{0,3})?".prop_map(String::into_bytes),
        vec(any::<u8>(), 0..6),
    ]
}

fn field() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        "[!-9;-~]{1,8}:[ \t]{0,2}[ -~]{0,8}[ \t]{0,2}".prop_map(String::into_bytes),
        (vec(any::<u8>(), 0..4), vec(any::<u8>(), 0..6))
            .prop_map(|(name, value)| [name, vec![b':'], value].concat()),
        Just(b"Connection: close".to_vec()),
        Just(b"Connection: x, keep-alive".to_vec()),
        Just(b"Expect: 100-continue".to_vec()),
    ]
}

/// A body with the field that tells its length.
fn body() -> impl Strategy<Value = (Vec<u8>, Vec<u8>)> {
    let plain = vec(any::<u8>(), 0..30);
    let chunk = (vec(any::<u8>(), 1..20), "(;[a-z=\" ]{0,5}|[ \t];x)?", any::<bool>());
    let trailer = "([A-Za-z-]{1,5}:[ -~]{0,5}\r\n)?";
    prop_oneof![
        Just((Vec::new(), Vec::new())),
        plain.prop_map(|body| (format!("Content-Length: {}\r\n", body.len()).into_bytes(), body)),
        (vec(chunk, 0..4), trailer).prop_map(|(chunks, trailer)| {
            let mut body = Vec::new();
            for (data, extension, is_upper) in chunks {
                let size = data.len();
                let size = if is_upper { format!("{size:X}") } else { format!("0{size:x}") };
                body.extend([size.as_bytes(), extension.as_bytes(), b"\r\n", &data, b"\r\n"].concat());
            }
            body.extend_from_slice(format!("0\r\n{trailer}\r\n").as_bytes());
            (b"Transfer-Encoding: chunked\r\n".to_vec(), body)
        }),
    ]
}

/// A request that is all right, mostly.
fn request() -> impl Strategy<Value = Vec<u8>> {
    let version = prop_oneof![8 => Just("HTTP/1.1"), 2 => Just("HTTP/1.0"), 1 => Just("HTTP/2.0"), 1 => Just("http/1.1")];
    let line_end = prop_oneof![30 => Just(&b"\r\n"[..]), 1 => Just(&b"\n"[..]), 1 => Just(&b"\r\r\n"[..])];
    ("[A-Z!#]{1,6}", target(), version, vec(field(), 0..4), body(), line_end).prop_map(
        |(method, target, version, fields, (length, body), line_end)| {
            let mut bytes = [method.as_bytes(), b" ", &target, b" ", version.as_bytes(), line_end].concat();
            bytes.extend_from_slice(b"Host: x\r\n");
            for field in fields {
                bytes.extend_from_slice(&field);
                bytes.extend_from_slice(b"\r\n");
            }
            [bytes, length, b"\r\n".to_vec(), body].concat()
        },
    )
}

/// What a client might send on a connection.
pub fn stream() -> impl Strategy<Value = Vec<u8>> {
    let requests = || vec(request(), 1..4).prop_map(|requests| requests.concat());
    // Somewhere in them bytes are changed, added or left out.
    let spoiled = (requests(), vec((any::<prop::sample::Index>(), 0..2usize, piece()), 1..3)).prop_map(
        |(mut bytes, changes)| {
            for (at, removed, added) in changes {
                let at = at.index(bytes.len() + 1);
                bytes.splice(at..(at + removed).min(bytes.len()), added);
            }
            bytes
        },
    );
    let heap = vec(piece(), 0..30).prop_map(|pieces| pieces.concat());
    prop_oneof![3 => requests(), 3 => spoiled, 2 => heap, 1 => vec(any::<u8>(), 0..200)]
}

/// `bytes` in pieces.
pub fn split<'a>(bytes: &'a [u8], cuts: &[prop::sample::Index]) -> Vec<&'a [u8]> {
    let mut at: Vec<_> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
    at.extend([0, bytes.len()]);
    at.sort_unstable();
    at.windows(2).map(|ends| &bytes[ends[0]..ends[1]]).filter(|piece| !piece.is_empty()).collect()
}

/// Where reading a stream has ended.
#[derive(Debug)]
struct Verdict {
    passed: usize,
    failure: Option<Failure>,
    heads: u64,
    in_head: bool,
}

/// Reads `pieces` as a connection does: what may not pass yet comes again.
fn scan(pieces: &[&[u8]]) -> Verdict {
    let mut scan = Scan::new(LIMITS);
    let mut held = Vec::new();
    let mut passed = 0;
    for piece in pieces {
        held.extend_from_slice(piece);
        let (taken, failure) = match scan.approve(&held) {
            Ok(taken) => (taken, None),
            Err((taken, failure)) => (taken, Some(failure)),
        };
        assert!(taken <= held.len());
        held.drain(..taken);
        passed += taken;
        if failure.is_some() {
            return Verdict { passed, failure, heads: scan.heads(), in_head: scan.in_head() };
        }
    }
    assert!(held.len() <= LIMITS.bytes, "{} bytes are held", held.len());
    Verdict { passed, failure: None, heads: scan.heads(), in_head: scan.in_head() }
}

/// Whether two failures are one to a client: too large may be found out before
/// another mistake, or after it.
fn alike(one: Option<Failure>, other: Option<Failure>) -> bool {
    let is_size = |failure: Option<Failure>| {
        failure.is_some_and(|failure| matches!(failure.status().as_u16(), 413 | 414 | 431))
    };
    one == other || (one.is_some() && other.is_some() && (is_size(one) || is_size(other)))
}

/// A header name as an app's neighbour or enemy would send it.
fn name() -> impl Strategy<Value = HeaderName> {
    let known = proptest::sample::select(vec![
        "host",
        "cookie",
        "proxy",
        "content-type",
        "content-length",
        "x-forwarded-for",
        "x_forwarded_for",
        "transfer-encoding",
        "x-a",
        "x_a",
        "x-real-ip",
        "forwarded",
        "http-proxy",
        "_",
        "-",
        "content_length",
    ]);
    prop_oneof![
        known.prop_map(HeaderName::from_static),
        "[a-z_!#$%&'*+.^`|~0-9-]{1,12}".prop_map(|name| HeaderName::from_bytes(name.as_bytes()).unwrap()),
    ]
}

fn value() -> impl Strategy<Value = HeaderValue> {
    prop_oneof!["[ -~]{0,20}".prop_map(String::into_bytes), vec(any::<u8>(), 0..12)]
        .prop_filter_map("not a value", |bytes| HeaderValue::from_bytes(&bytes).ok())
}

fn headers() -> impl Strategy<Value = HeaderMap> {
    vec((name(), value()), 0..12).prop_map(|pairs| {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(name, value);
        }
        headers
    })
}

/// What proxies write of a client, and what it makes up.
fn told() -> impl Strategy<Value = HeaderMap> {
    let name = proptest::sample::select(vec![
        "forwarded",
        "x-forwarded-for",
        "x-forwarded-proto",
        "x-forwarded-host",
        "x-forwarded-prefix",
        "x-forwarded-port",
        "x-real-ip",
        "x-client-ip",
        "true-client-ip",
        "x-cluster-client-ip",
        "host",
        "x-a",
    ]);
    let word = proptest::sample::select(vec![
        "for=",
        "For=\"",
        "proto=",
        "host=",
        "by=x",
        "1.2.3.4",
        "[::1]:80",
        "2001:db8::1",
        "unknown",
        "_x",
        "https",
        "http",
        "a.example",
        "/a/b",
        "/",
        "..",
        ",",
        ";",
        "\"",
        "\\",
        "=",
        " ",
        "\t",
        "%2e",
        "x",
    ]);
    let text = vec(word, 0..10).prop_map(|words| words.concat());
    vec((name, text), 0..8).prop_map(|pairs| {
        let mut headers = HeaderMap::new();
        for (name, text) in pairs {
            headers.append(name, HeaderValue::from_str(&text).unwrap());
        }
        headers
    })
}

fn address() -> impl Strategy<Value = SocketAddr> {
    let ip = prop_oneof![any::<[u8; 4]>().prop_map(IpAddr::from), any::<[u8; 16]>().prop_map(IpAddr::from),];
    (ip, 1u16..).prop_map(|(ip, port)| SocketAddr::new(ip, port))
}

/// Names and values of an environ block, as the guest takes it apart.
fn take_apart(block: &[u8]) -> Vec<(String, Vec<u8>)> {
    let fields: Vec<_> = block.split(|byte| *byte == 0).collect();
    let count = fields.iter().position(|field| field.is_empty()).unwrap();
    let values = &fields[count + 1..];
    assert_eq!(values.len(), count, "names and values do not match");
    std::iter::zip(&fields, values)
        .map(|(name, value)| (String::from_utf8(name.to_vec()).unwrap(), value.to_vec()))
        .collect()
}

proptest! {
    #![proptest_config(config())]

    /// Where the bytes are cut must not matter, nor may any input panic.
    #[test]
    fn a_stream_is_judged_the_same_in_any_pieces(
        bytes in stream(),
        cuts in vec(any::<prop::sample::Index>(), 0..20),
    ) {
        let whole = scan(&[&bytes]);
        for pieces in [split(&bytes, &cuts), bytes.chunks(1).collect()] {
            let cut = scan(&pieces);
            prop_assert!(alike(whole.failure, cut.failure), "{whole:?} but {cut:?}");
            prop_assert!(whole.passed <= cut.passed, "{whole:?} but {cut:?}");
            if whole.failure.is_none() || whole.failure == cut.failure {
                prop_assert_eq!((whole.heads, whole.in_head), (cut.heads, cut.in_head));
            }
            if whole.failure.is_none() {
                prop_assert_eq!(whole.passed, cut.passed);
            }
        }
    }

    /// Each variable is there for a reason, and each header that may be there is.
    #[test]
    fn an_environ_has_what_the_request_has_and_nothing_else(
        headers in headers(),
        target in target(),
        mount in "(/[a-z~ ]{1,4}){0,2}/?",
        prefix in "(/[a-z]{1,3}){0,2}",
    ) {
        let Ok(mut request) = Request::get(&*target).body(()) else { return Ok(()) };
        *request.headers_mut() = headers;
        let (parts, ()) = request.into_parts();
        let mount = script_name(&mount).unwrap();
        let path = parts.uri.path();
        // Only a request below the mount gets here.
        let mount = if path_info(path, mount).is_some() { mount } else { "" };
        let connection = Connection { prefix: prefix.clone(), ..Connection::default() };
        let block = match environ(&parts, &connection, mount) {
            Ok(block) => block,
            Err(failure) => {
                prop_assert!(path.contains("%00"), "{failure}");
                return Ok(());
            }
        };
        let variables = take_apart(&block);
        let get = |name: &str| {
            let mut found = variables.iter().filter(|(key, _)| key == name);
            let value = found.next().map(|(_, value)| value.clone());
            assert!(found.next().is_none(), "{name} twice");
            value
        };
        prop_assert_eq!(get("HTTP_PROXY"), None);
        prop_assert_eq!(get("SCRIPT_NAME").unwrap(), [&*prefix, mount].concat().into_bytes());
        let info = get("PATH_INFO").unwrap();
        prop_assert!(info.is_empty() || info[0] == b'/' || !path.starts_with('/'));
        // Both together are the path, decoded once.
        if path != "*" {
            prop_assert_eq!([mount.as_bytes(), &info].concat(), decode(path));
        }
        for (name, value) in &variables {
            prop_assert!(!name.is_empty() && name.bytes().all(|byte| byte.is_ascii_graphic()));
            let is_path = matches!(&**name, "PATH_INFO" | "SCRIPT_NAME");
            prop_assert!(is_path || !value.iter().any(|byte| b"\0\r\n".contains(byte)), "{name}");
            let Some(rest) = name.strip_prefix("HTTP_") else { continue };
            let header = rest.replace('_', "-").to_ascii_lowercase();
            if header == "host" && parts.uri.authority().is_some() {
                continue;
            }
            prop_assert!(parts.headers.contains_key(&header), "{name} comes from no header");
        }
        for name in parts.headers.keys() {
            let text = name.as_str();
            if text.contains('_') || text == "proxy" || (text == "host" && parts.uri.authority().is_some()) {
                continue;
            }
            let plain = matches!(text, "content-type" | "content-length");
            let variable = text.replace('-', "_").to_ascii_uppercase();
            let found = get(&if plain { variable } else { format!("HTTP_{variable}") });
            let mut values = parts.headers.get_all(name).iter().map(HeaderValue::as_bytes);
            let expected = if plain {
                values.next().unwrap().to_vec()
            } else {
                let separator: &[u8] = if text == "cookie" { b"; " } else { b"," };
                values.collect::<Vec<_>>().join(separator)
            };
            prop_assert_eq!(found, Some(expected), "{}", text);
        }
    }

    /// Nobody but a trusted proxy says who the client is, and what it says is
    /// well-formed.
    #[test]
    fn only_trusted_proxies_are_believed(
        headers in told(),
        is_trusted in any::<bool>(),
        hops in 1usize..4,
        dialect in prop_oneof![Just(Dialect::XForwarded), Just(Dialect::Forwarded)],
        target in prop_oneof![Just("/x"), Just("http://b.example/x"), Just("http://b.example")],
    ) {
        let mut request = Request::get(target).body(()).unwrap();
        *request.headers_mut() = headers.clone();
        let (mut parts, ()) = request.into_parts();
        let connection = Connection { peer: Some("192.0.2.1:5".parse().unwrap()), ..Connection::default() };
        let proxies = Proxies::new(&[], dialect, hops).unwrap();
        let Ok(seen) = proxies.apply(is_trusted, &mut parts, &connection) else {
            prop_assert!(is_trusted, "a client's headers are refused");
            return Ok(());
        };
        let is_about = |name: &str| {
            name.starts_with("x-forwarded-") || name.ends_with("-ip") || name == "forwarded"
        };
        for name in parts.headers.keys().map(HeaderName::as_str) {
            prop_assert!(!is_about(name) || is_trusted, "{name} of a client is there");
            prop_assert!(headers.contains_key(name) || name == "host");
        }
        if !is_trusted {
            prop_assert_eq!((seen.peer, seen.is_https, &*seen.prefix), (connection.peer, false, ""));
            prop_assert_eq!(parts.headers.get("host"), headers.get("host"));
            return Ok(());
        }
        prop_assert!(script_name(&seen.prefix) == Some(&*seen.prefix), "{:?}", seen.prefix);
        if parts.headers.get("host") != headers.get("host") {
            prop_assert!(is_host(parts.headers["host"].as_bytes()));
            prop_assert!(parts.uri.authority().is_none());
            prop_assert_eq!(parts.headers.get_all("host").iter().count(), 1);
        }
        let theirs: &[&str] = match dialect {
            Dialect::Forwarded => &["forwarded"],
            Dialect::XForwarded =>
                &["x-forwarded-for", "x-forwarded-proto", "x-forwarded-host", "x-forwarded-prefix"],
        };
        for name in parts.headers.keys().map(HeaderName::as_str) {
            prop_assert!(!is_about(name) || theirs.contains(&name), "{name} is nobody's");
        }
    }

    /// The element that counts is the one so far from the right, whatever the
    /// client has put before it.
    #[test]
    fn the_chain_of_proxies_is_read_from_its_end(
        clients in vec(address(), 1..5),
        hops in 1usize..4,
        is_split in any::<bool>(),
        dialect in prop_oneof![Just(Dialect::XForwarded), Just(Dialect::Forwarded)],
    ) {
        let (name, elements): (_, Vec<_>) = match dialect {
            Dialect::XForwarded => ("x-forwarded-for", clients.iter().map(SocketAddr::to_string).collect()),
            Dialect::Forwarded => (
                "forwarded",
                clients.iter().map(|client| format!("by=x;For=\"{client}\" ; proto=https")).collect(),
            ),
        };
        let mut request = Request::get("/");
        if is_split {
            for element in &elements {
                request = request.header(name, element);
            }
        } else {
            request = request.header(name, elements.join(" ,\t"));
        }
        let (mut parts, ()) = request.body(()).unwrap().into_parts();
        let connection = Connection::default();
        let proxies = Proxies::new(&[], dialect, hops).unwrap();
        let seen = proxies.apply(true, &mut parts, &connection).unwrap();
        let expected = clients.len().checked_sub(hops).map(|index| clients[index]);
        prop_assert_eq!(seen.peer, expected);
        prop_assert_eq!(seen.is_https, dialect == Dialect::Forwarded && expected.is_some());
    }

    /// A PROXY header is read to its end and no further.
    #[test]
    fn a_proxy_header_says_what_was_written(
        (client, server) in prop_oneof![
            any::<([u8; 4], u16, [u8; 4], u16)>().prop_map(|(a, b, c, d)| ((a, b).into(), (c, d).into())),
            any::<([u8; 16], u16, [u8; 16], u16)>().prop_map(|(a, b, c, d)| ((a, b).into(), (c, d).into())),
        ],
        is_binary in any::<bool>(),
        extension in vec(any::<u8>(), 0..20),
        rest in vec(any::<u8>(), 0..20),
    ) {
        let (client, server): (SocketAddr, SocketAddr) = (client, server);
        let mut bytes = Vec::new();
        if is_binary {
            let (family, mut block) = match (client.ip(), server.ip()) {
                (IpAddr::V4(client), IpAddr::V4(server)) => (0x11, [client.octets(), server.octets()].concat()),
                (IpAddr::V6(client), IpAddr::V6(server)) => (0x21, [client.octets(), server.octets()].concat()),
                _ => return Ok(()),
            };
            for port in [client.port(), server.port()] {
                block.extend_from_slice(&port.to_be_bytes());
            }
            block.extend_from_slice(&extension);
            bytes.extend_from_slice(b"\r\n\r\n\0\r\nQUIT\n\x21");
            bytes.push(family);
            bytes.extend_from_slice(&u16::try_from(block.len()).unwrap().to_be_bytes());
            bytes.extend_from_slice(&block);
        } else {
            let family = if client.is_ipv4() { "TCP4" } else { "TCP6" };
            let (from, to) = (client.ip(), server.ip());
            bytes = format!("PROXY {family} {from} {to} {} {}\r\n", client.port(), server.port()).into_bytes();
        }
        bytes.extend_from_slice(&rest);
        let (header, left) = read_proxy_header(&bytes);
        prop_assert_eq!(header, Some(Header::Proxied(client, server)));
        prop_assert_eq!(left, rest.len());
    }

    /// Whatever comes first on a connection, nothing of what follows a header
    /// plays a part in it.
    #[test]
    fn a_proxy_header_does_not_depend_on_what_follows(
        start in proptest::sample::select(vec![
            &b"PROXY TCP4 "[..], b"PROXY ", b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0", b"\r\n\r\n\0\r\nQUIT\n", b"",
        ]),
        words in vec(
            prop_oneof![
                Just(b"1.2.3.4".to_vec()), Just(b"::1".to_vec()), Just(b" ".to_vec()), Just(b"80".to_vec()),
                Just(b"\r\n".to_vec()), Just(b"UNKNOWN".to_vec()), vec(any::<u8>(), 1..20),
            ],
            0..12,
        ),
    ) {
        let bytes = [start, &words.concat()].concat();
        let (header, left) = read_proxy_header(&bytes);
        let length = bytes.len() - left;
        prop_assert!(length <= 16 + 4096);
        if header.is_some() {
            prop_assert_eq!(read_proxy_header(&bytes[..length]), (header, 0));
            prop_assert_eq!(read_proxy_header(&bytes[..length - 1]).0, None);
        }
    }

    /// What passes as the head of a response can be written as one: it has
    /// only what an app may send, and splits nowhere else.
    #[test]
    fn a_response_head_that_passes_is_fit_to_be_sent(
        status in prop_oneof![
            8 => Just("Status: 200 OK\r\n".to_owned()),
            1 => "Status: [0-9]{1,4} ?[ -~\t]{0,5}\r\n",
            1 => "[ -~]{0,12}\r\n",
        ],
        lines in vec(
            prop_oneof![
                4 => "[A-Za-z-]{1,6}: ?[ -~]{0,8}\r\n".prop_map(String::into_bytes),
                1 => "(Content-Length|Connection|Transfer-Encoding|Set-Cookie): [0-9a-z]{0,4}\r\n"
                    .prop_map(String::into_bytes),
                1 => vec(any::<u8>(), 0..8),
                1 => piece(),
            ],
            0..6,
        ),
        body in vec(any::<u8>(), 0..10),
    ) {
        let bytes = [status.as_bytes(), &lines.concat(), b"\r\n", &body].concat();
        let Ok((head, rest)) = parse_head(&bytes) else { return Ok(()) };
        prop_assert!(bytes.ends_with(rest));
        prop_assert!((200..600).contains(&head.status.as_u16()));
        prop_assert!(head.headers.get_all("content-length").iter().count() <= 1);
        let mut again = format!("Status: {} ", head.status.as_u16()).into_bytes();
        let usual = head.status.canonical_reason().unwrap_or_default();
        again.extend_from_slice(head.reason.as_ref().map_or(usual.as_bytes(), |reason| reason.as_bytes()));
        again.extend_from_slice(b"\r\n");
        for (name, value) in &head.headers {
            prop_assert!(!matches!(
                name.as_str(),
                "connection" | "keep-alive" | "transfer-encoding" | "te" | "trailer" | "upgrade"
            ));
            prop_assert!(!value.as_bytes().iter().any(|byte| b"\0\r\n".contains(byte)));
            again.extend_from_slice(&[name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"].concat());
        }
        again.extend_from_slice(b"\r\n");
        prop_assert_eq!(again.windows(2).filter(|pair| pair == b"\r\n").count(), head.headers.len() + 2);
        let (same, nothing) = parse_head(&again).unwrap();
        prop_assert!(nothing.is_empty());
        prop_assert_eq!((same.status, same.headers), (head.status, head.headers));
    }

    /// Hosts that pass are hosts to other programs too.
    #[test]
    fn a_host_has_no_path_user_or_space(
        text in prop_oneof!["[ -~]{0,12}", "\\[[0-9a-f:.]{0,12}\\]?:?[0-9a-z]{0,6}", "[a-z0-9.-]{1,9}:[0-9]{0,6}"],
    ) {
        if is_host(text.as_bytes()) {
            let has_other = text.contains(['/', '\\', '@', '?', '#', ' ', '"', '<', '>', '^', '`', '{', '|', '}']);
            prop_assert!(!has_other, "{}", text);
            prop_assert!(text.parse::<http::uri::Authority>().is_ok(), "{text}");
        }
    }

    /// A request that passes has one host and a path.
    #[test]
    fn a_checked_request_has_one_host_and_a_path(
        target in target(),
        hosts in vec("[a-z.:@/]{0,8}", 0..3),
        version in prop_oneof![Just(http::Version::HTTP_10), Just(http::Version::HTTP_11), Just(http::Version::HTTP_2)],
    ) {
        let mut request = Request::get(&*target).version(version);
        for host in &hosts {
            request = request.header("host", host);
        }
        let Ok(request) = request.body(()) else { return Ok(()) };
        let (parts, ()) = request.into_parts();
        if wire::check_request(&parts, &LIMITS).is_ok() {
            prop_assert!(hosts.len() <= 1);
            prop_assert!(parts.uri.path().starts_with('/') || parts.uri.path().is_empty());
            let host = crate::environ::host(&parts);
            prop_assert!(is_host(host.as_bytes()) || (host.is_empty() && version == http::Version::HTTP_10));
        }
    }
}

#[test]
fn the_longest_request_line_may_come_in_pieces() {
    let (method, target) = ("M".repeat(64), "a".repeat(LIMITS.target - 1));
    let request = format!("{method} /{target} HTTP/1.1\r\nHost: x\r\n\r\n");
    let verdict = scan(&request.as_bytes().chunks(1).collect::<Vec<_>>());
    assert_eq!((verdict.failure, verdict.heads), (None, 1));
    let longer = request.replace("HTTP", "aHTTP");
    assert!(scan(&longer.as_bytes().chunks(1).collect::<Vec<_>>()).failure.is_some());
}

/// What is at the start of a connection, and how much is left behind it.
fn read_proxy_header(bytes: &[u8]) -> (Option<Header>, usize) {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let mut rest = bytes;
    let header = runtime.block_on(proxy_protocol::read(&mut rest)).ok();
    (header, rest.len())
}

/// `%XX` decoded, in the plainest way.
fn decode(text: &str) -> Vec<u8> {
    let bytes = text.as_bytes();
    let mut decoded = Vec::new();
    let mut index = 0;
    while index < bytes.len() {
        let digits =
            text.get(index + 1..index + 3).filter(|digits| digits.bytes().all(|b| b.is_ascii_hexdigit()));
        match (bytes[index], digits) {
            (b'%', Some(digits)) => {
                decoded.push(u8::from_str_radix(digits, 16).unwrap());
                index += 3;
            }
            (byte, _) => {
                decoded.push(byte);
                index += 1;
            }
        }
    }
    decoded
}
