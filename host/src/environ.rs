//! From an HTTP request to the CGI variables of PEP 3333, as one block: the
//! names, an empty field, the values, with a NUL between two fields.

use std::net::SocketAddr;

use http::header::{self, HeaderName};
use http::request::Parts;

use crate::failure::Failure;

/// Where a connection came in and who is on its other end.
#[derive(Clone, Debug, Default)]
pub struct Connection {
    /// `SERVER_NAME`: the address of our end.
    pub server_name: String,
    /// `SERVER_PORT`.
    pub server_port: String,
    /// The client's address, with port 0 if that is not known; none on a unix
    /// socket.
    pub peer: Option<SocketAddr>,
    /// Whether the client speaks TLS, with us or with a proxy that says so.
    pub is_https: bool,
    /// The path at which a proxy mounts us: empty, or with a slash before and
    /// none behind.
    pub prefix: String,
    /// The certificate by which the client has identified itself, as PEM.
    pub client_certificate: Option<String>,
}

/// The variables of a request of our own for `path`, as of nobody's.
///
/// # Errors
///
/// [`Failure::BadRequest`] if `path` can not be asked for.
pub fn of_our_own(path: &str) -> Result<Vec<u8>, Failure> {
    let request = http::Request::get(path).header(header::HOST, "localhost").body(());
    let (parts, ()) = request.map_err(|_| Failure::BadRequest("the path is not valid"))?.into_parts();
    let connection = Connection {
        server_name: "localhost".into(),
        server_port: "80".into(),
        peer: None,
        ..Connection::default()
    };
    environ(&parts, &connection, "")
}

/// `prefix` as PEP 3333 wants a `SCRIPT_NAME`: empty for the root, else with
/// a slash at its start and none at its end. None if it is no plain path.
pub fn script_name(prefix: &str) -> Option<&str> {
    let name = prefix.strip_suffix('/').unwrap_or(prefix);
    let is_path = name.is_empty()
        || name.strip_prefix('/').is_some_and(|rest| {
            rest.split('/').all(|segment| !matches!(segment, "" | "." | ".."))
                && !rest.contains(|char: char| char.is_control() || matches!(char, '?' | '#' | '%'))
        });
    is_path.then_some(name)
}

/// What follows `script_name` in `path`, a request's path as it was sent:
/// empty, or with a slash at its start. None if `path` is not below it.
///
/// Encoded and plain characters are equal (RFC 3986 section 6.2.2.2), so that
/// no spelling of a path leads to another app. A slash stays what it is.
pub fn path_info<'a>(path: &'a str, script_name: &str) -> Option<&'a str> {
    let mut rest = path.as_bytes();
    for expected in script_name.bytes() {
        let encoded = rest.first() == Some(&b'%');
        let (byte, after) = decode_first(rest)?;
        if byte != expected || (encoded && byte == b'/') {
            return None;
        }
        rest = after;
    }
    // A character that was sent as it is starts at a boundary of `path`.
    let info = path.get(path.len() - rest.len()..)?;
    (info.is_empty() || info.starts_with('/')).then_some(info)
}

/// The host that a request is for, as the client wrote it.
pub fn host(parts: &Parts) -> &str {
    // An absolute-form target carries the host, which then counts instead of
    // the header (RFC 9112 section 3.2.2).
    match parts.uri.authority() {
        Some(authority) => authority.as_str(),
        None => parts.headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default(),
    }
}

/// The environ block for a request to an app that is mounted at
/// `script_name`, which is empty or what [`script_name`] returned.
///
/// # Errors
///
/// [`Failure::BadRequest`] if the path holds an encoded NUL. The block could
/// not carry it, and C code below an app would see a shorter path than the
/// checks before it.
pub fn environ(parts: &Parts, connection: &Connection, script_name: &str) -> Result<Vec<u8>, Failure> {
    let mut block = Block { names: Vec::with_capacity(512), values: Vec::with_capacity(1024) };
    block.add("REQUEST_METHOD", parts.method.as_str().as_bytes());
    // A proxy before us may have its own mount in front of ours.
    let mount: &[&[u8]] = &[connection.prefix.as_bytes(), script_name.as_bytes()];
    block.add("SCRIPT_NAME", &mount.concat());
    let path = parts.uri.path();
    // `OPTIONS *` has no path at all (RFC 9112 section 3.2.4).
    let path = if path == "*" { "" } else { path };
    block.add_percent_decoded("PATH_INFO", path_info(path, script_name).unwrap_or(path))?;
    block.add("QUERY_STRING", parts.uri.query().unwrap_or_default().as_bytes());
    let target = parts.uri.path_and_query().map_or("*", |target| target.as_str());
    block.add("REQUEST_URI", target.as_bytes());
    block.add("RAW_URI", target.as_bytes());
    block.add("SERVER_NAME", connection.server_name.as_bytes());
    block.add("SERVER_PORT", connection.server_port.as_bytes());
    block.add("SERVER_PROTOCOL", protocol(parts.version));
    block.add("SERVER_SOFTWARE", concat!("wsgi-wasm/", env!("CARGO_PKG_VERSION")).as_bytes());
    block.add("GATEWAY_INTERFACE", b"CGI/1.1");
    if connection.is_https {
        block.add("wsgi.url_scheme", b"https");
        block.add("HTTPS", b"on");
    } else {
        block.add("wsgi.url_scheme", b"http");
    }
    if let Some(peer) = connection.peer {
        block.add("REMOTE_ADDR", peer.ip().to_canonical().to_string().as_bytes());
        if peer.port() != 0 {
            block.add("REMOTE_PORT", peer.port().to_string().as_bytes());
        }
    }
    if let Some(certificate) = &connection.client_certificate {
        block.add("SSL_CLIENT_VERIFY", b"SUCCESS");
        block.add("SSL_CLIENT_CERT", certificate.as_bytes());
    }
    // An absolute-form target carries the host, which then counts instead of
    // the header (RFC 9112 section 3.2.2).
    let authority = parts.uri.authority().map(|authority| authority.as_str());
    if let Some(authority) = authority {
        block.add("HTTP_HOST", authority.as_bytes());
    }
    for name in parts.headers.keys() {
        if name == header::HOST && authority.is_some() {
            continue;
        }
        block.add_header(name, &parts.headers);
    }
    Ok(block.join())
}

/// `SERVER_PROTOCOL`, as the client sent it.
fn protocol(version: http::Version) -> &'static [u8] {
    match version {
        http::Version::HTTP_10 => b"HTTP/1.0",
        http::Version::HTTP_2 => b"HTTP/2.0",
        _ => b"HTTP/1.1",
    }
}

/// An environ block under construction.
struct Block {
    /// The names, each with a NUL behind it.
    names: Vec<u8>,
    /// The values, each with a NUL before it.
    values: Vec<u8>,
}

impl Block {
    /// Adds a variable whose value is known to hold no NUL.
    fn add(&mut self, name: &str, value: &[u8]) {
        debug_assert!(!value.contains(&0));
        self.names.extend_from_slice(name.as_bytes());
        self.names.push(0);
        self.values.push(0);
        self.values.extend_from_slice(value);
    }

    /// The whole block. A client's requests have the same names, mostly, which
    /// the guest need not take apart again: so they come first.
    fn join(mut self) -> Vec<u8> {
        self.names.append(&mut self.values);
        self.names
    }

    /// Adds a variable with its `%XX` decoded to bytes. A `%` without two
    /// hexadecimal digits stays as it is, as every WSGI server has it.
    fn add_percent_decoded(&mut self, name: &str, value: &str) -> Result<(), Failure> {
        self.names.extend_from_slice(name.as_bytes());
        self.names.push(0);
        self.values.push(0);
        let mut rest = value.as_bytes();
        while let Some((decoded, after)) = decode_first(rest) {
            rest = after;
            if decoded == 0 {
                return Err(Failure::BadRequest("the path holds an encoded NUL"));
            }
            self.values.push(decoded);
        }
        Ok(())
    }

    /// Adds all values of a header, joined as RFC 9110 section 5.3 allows.
    fn add_header(&mut self, name: &HeaderName, headers: &http::HeaderMap) {
        let text = name.as_str();
        // `X_Forwarded_For` would become the same variable as
        // `X-Forwarded-For`, and a proxy in front filters only the latter.
        // `Proxy` would become HTTP_PROXY, which HTTP clients obey (httpoxy).
        if text.contains('_') || text == "proxy" {
            return;
        }
        let plain = matches!(*name, header::CONTENT_TYPE | header::CONTENT_LENGTH);
        if !plain {
            self.names.extend_from_slice(b"HTTP_");
        }
        self.names.extend(text.bytes().map(|byte| match byte {
            b'-' => b'_',
            byte => byte.to_ascii_uppercase(),
        }));
        self.names.push(0);
        self.values.push(0);
        let separator: &[u8] = if *name == header::COOKIE { b"; " } else { b"," };
        for (index, value) in headers.get_all(name).iter().enumerate() {
            // These have one value; a second one is the client's mistake, and
            // `Content-Length` with two different ones never gets here.
            if index > 0 && plain {
                break;
            }
            if index > 0 {
                self.values.extend_from_slice(separator);
            }
            self.values.extend_from_slice(value.as_bytes());
        }
    }
}

/// The first byte of `text` with `%XX` decoded, and what follows it.
fn decode_first(text: &[u8]) -> Option<(u8, &[u8])> {
    if let [b'%', high, low, after @ ..] = text
        && let (Some(high), Some(low)) = (hex(*high), hex(*low))
    {
        return Some((high << 4 | low, after));
    }
    text.split_first().map(|(byte, after)| (*byte, after))
}

/// The value of a hexadecimal digit.
fn hex(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).and_then(|value| u8::try_from(value).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(request: http::request::Builder) -> Result<Vec<(String, Vec<u8>)>, Failure> {
        mounted(request, "")
    }

    fn mounted(
        request: http::request::Builder,
        script_name: &str,
    ) -> Result<Vec<(String, Vec<u8>)>, Failure> {
        let (parts, ()) = request.body(()).unwrap().into_parts();
        let connection = Connection {
            server_name: "127.0.0.1".into(),
            server_port: "8000".into(),
            peer: Some("[::ffff:10.0.0.1]:5000".parse().unwrap()),
            is_https: false,
            prefix: String::new(),
            client_certificate: None,
        };
        let block = environ(&parts, &connection, script_name)?;
        let fields: Vec<_> = block.split(|byte| *byte == 0).collect();
        let names = fields.iter().position(|field| field.is_empty()).unwrap();
        let values = &fields[names + 1..];
        assert_eq!(values.len(), names);
        Ok(std::iter::zip(&fields, values)
            .map(|(name, value)| (String::from_utf8(name.to_vec()).unwrap(), value.to_vec()))
            .collect())
    }

    fn get(pairs: &[(String, Vec<u8>)], name: &str) -> Option<String> {
        let mut found = pairs.iter().filter(|(key, _)| key == name);
        let value = found.next().map(|(_, value)| value.iter().map(|byte| char::from(*byte)).collect());
        assert!(found.next().is_none(), "{name} twice");
        value
    }

    #[test]
    fn the_path_is_decoded_and_the_query_is_not() {
        let pairs = of(http::Request::get("/a%20b/%C3%A9%2Fc%zz%4?x=%20y&z")).unwrap();
        assert_eq!(get(&pairs, "PATH_INFO").unwrap(), "/a b/\u{c3}\u{a9}/c%zz%4");
        assert_eq!(get(&pairs, "QUERY_STRING").unwrap(), "x=%20y&z");
        assert_eq!(get(&pairs, "REQUEST_URI").unwrap(), "/a%20b/%C3%A9%2Fc%zz%4?x=%20y&z");
        assert_eq!(get(&pairs, "SCRIPT_NAME").unwrap(), "");
        assert_eq!(get(&pairs, "REMOTE_ADDR").unwrap(), "10.0.0.1");
    }

    #[test]
    fn a_script_name_has_no_slash_at_its_end() {
        for (prefix, name) in
            [("", ""), ("/", ""), ("/shop", "/shop"), ("/shop/", "/shop"), ("/a/b c/", "/a/b c")]
        {
            assert_eq!(script_name(prefix), Some(name));
        }
        for bad in ["shop", "//", "/a//b", "/a?b", "/a#b", "/a/../b", "/.", "/a%20b", "/a\0", "/a\n"] {
            assert_eq!(script_name(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn path_info_is_empty_or_starts_with_a_slash() {
        for (path, name, info) in [
            ("/shop", "/shop", Some("")),
            ("/shop/", "/shop", Some("/")),
            ("/shop/a%2Fb", "/shop", Some("/a%2Fb")),
            ("/%73h%6fp/x", "/shop", Some("/x")),
            ("/shop//x", "/shop", Some("//x")),
            ("/b%C3%BCcher/x", "/b\u{fc}cher", Some("/x")),
            ("/x", "", Some("/x")),
            ("/shopping", "/shop", None),
            ("/shop%2Fx", "/shop", None),
            ("%2Fshop/x", "/shop", None),
            ("/sho", "/shop", None),
            ("/SHOP", "/shop", None),
        ] {
            assert_eq!(path_info(path, name), info, "{path} below {name}");
        }
    }

    #[test]
    fn a_mounted_app_sees_its_mount() {
        for (path, info) in [("/shop", ""), ("/shop/", "/"), ("/shop/a%20b?q", "/a b")] {
            let pairs = mounted(http::Request::get(path), "/shop").unwrap();
            assert_eq!(get(&pairs, "SCRIPT_NAME").unwrap(), "/shop");
            assert_eq!(get(&pairs, "PATH_INFO").unwrap(), info);
            assert_eq!(get(&pairs, "REQUEST_URI").unwrap(), path);
        }
    }

    #[test]
    fn an_encoded_nul_is_refused() {
        assert_eq!(of(http::Request::get("/a%00SERVER_NAME%00evil")).unwrap_err().status(), 400);
    }

    #[test]
    fn headers_become_variables() {
        let pairs = of(http::Request::post("/")
            .header("Host", "example.org")
            .header("Content-Type", "text/plain")
            .header("Content-Length", "3")
            .header("X-One", "a")
            .header("X-One", "b")
            .header("Cookie", "a=1")
            .header("Cookie", "b=2")
            .header("X-Latin", http::HeaderValue::from_bytes(b"caf\xe9").unwrap()))
        .unwrap();
        assert_eq!(get(&pairs, "CONTENT_TYPE").unwrap(), "text/plain");
        assert_eq!(get(&pairs, "CONTENT_LENGTH").unwrap(), "3");
        assert_eq!(get(&pairs, "HTTP_CONTENT_TYPE"), None);
        assert_eq!(get(&pairs, "HTTP_X_ONE").unwrap(), "a,b");
        assert_eq!(get(&pairs, "HTTP_COOKIE").unwrap(), "a=1; b=2");
        assert_eq!(get(&pairs, "HTTP_X_LATIN").unwrap(), "caf\u{e9}");
        assert_eq!(get(&pairs, "HTTP_HOST").unwrap(), "example.org");
    }

    #[test]
    fn no_header_can_pose_as_another_or_as_a_proxy_setting() {
        let pairs = of(http::Request::get("/")
            .header("X_Forwarded_For", "6.6.6.6")
            .header("Proxy", "http://evil")
            .header("Content_Length", "9"))
        .unwrap();
        for name in ["HTTP_X_FORWARDED_FOR", "HTTP_PROXY", "CONTENT_LENGTH", "HTTP_CONTENT_LENGTH"] {
            assert_eq!(get(&pairs, name), None, "{name}");
        }
    }

    #[test]
    fn the_absolute_form_sets_the_host() {
        let pairs = of(http::Request::get("http://real.example/x").header("Host", "other.example")).unwrap();
        assert_eq!(get(&pairs, "HTTP_HOST").unwrap(), "real.example");
        assert_eq!(get(&pairs, "PATH_INFO").unwrap(), "/x");
        assert_eq!(get(&pairs, "REQUEST_URI").unwrap(), "/x");
    }
}
