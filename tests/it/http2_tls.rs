use std::future::Future;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use h2::client::SendRequest;
use http::Request;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::task::JoinHandle;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use crate::harness::{Server, guest, run, wsgi_wasm};

/// Runs a client, but not for ever.
fn client<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { tokio::time::timeout(Duration::from_secs(60), work).await.unwrap() })
}

type Driver = JoinHandle<Result<(), h2::Error>>;

async fn speak(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) -> (SendRequest<Bytes>, Driver) {
    let (sender, connection) = h2::client::handshake(stream).await.unwrap();
    (sender, tokio::spawn(connection))
}

async fn connect(server: &Server) -> (SendRequest<Bytes>, Driver) {
    speak(tokio::net::TcpStream::connect(server.address()).await.unwrap()).await
}

/// Sends a request and reads the response's body.
async fn ask(
    sender: &mut SendRequest<Bytes>,
    method: &str,
    path: &str,
    body: &[u8],
) -> Result<(u16, Vec<u8>), h2::Error> {
    let request =
        Request::builder().method(method).uri(format!("http://test.example{path}")).body(()).unwrap();
    let mut ready = sender.clone().ready().await?;
    let (response, mut stream) = ready.send_request(request, body.is_empty())?;
    if !body.is_empty() {
        stream.send_data(Bytes::copy_from_slice(body), true)?;
    }
    let response = response.await?;
    let status = response.status().as_u16();
    let mut incoming = response.into_body();
    let mut whole = Vec::new();
    while let Some(data) = incoming.data().await {
        let data = data?;
        incoming.flow_control().release_capacity(data.len())?;
        whole.extend_from_slice(&data);
    }
    Ok((status, whole))
}

#[test]
fn http2_by_prior_knowledge_carries_requests_side_by_side() {
    let server = Server::start("behaviours", &["--http2-streams", "7"]);
    client(async {
        let (mut sender, driver) = connect(&server).await;
        let (status, body) = ask(&mut sender, "GET", "/show-environ?a=b", b"").await.unwrap();
        assert_eq!(status, 200);
        let environ: serde_json::Value = serde_json::from_slice(&body).unwrap();
        for (name, value) in [
            ("SERVER_PROTOCOL", "HTTP/2.0"),
            ("HTTP_HOST", "test.example"),
            ("PATH_INFO", "/show-environ"),
            ("QUERY_STRING", "a=b"),
            ("wsgi.url_scheme", "http"),
        ] {
            assert_eq!(environ[name], value, "{name}");
        }
        let upload = vec![b'x'; 3 << 20];
        let (_, body) = ask(&mut sender, "POST", "/count-only", &upload).await.unwrap();
        assert_eq!(body, b"3145728");
        let (_, body) = ask(&mut sender, "GET", "/large?3", b"").await.unwrap();
        assert!(body.len() == 3 << 20 && body.iter().enumerate().all(|(index, byte)| *byte == index as u8));
        let (_, body) = ask(&mut sender, "GET", "/large-whole?900000", b"").await.unwrap();
        assert_eq!(body.len(), 900_000);
        // A slow one does not hold up another.
        let mut second = sender.clone();
        let slow = tokio::spawn(async move { ask(&mut second, "GET", "/sleep?1", b"").await });
        assert_eq!(ask(&mut sender, "GET", "/hello", b"").await.unwrap(), (200, b"Hello, world!\n".to_vec()));
        assert!(!slow.is_finished());
        assert_eq!(slow.await.unwrap().unwrap(), (200, b"slept".to_vec()));
        assert_eq!(sender.current_max_send_streams(), 7);

        assert_eq!(ask(&mut sender, "GET", "/fail", b"").await.unwrap().0, 500);
        let broken = ask(&mut sender, "GET", "/stream-then-fail", b"").await.unwrap_err();
        assert!(broken.is_reset(), "{broken}");
        assert_eq!(ask(&mut sender, "GET", "/hello", b"").await.unwrap().0, 200, "only the stream was cut");
        let long = format!("/hello?{}", "a".repeat(8192));
        assert_eq!(ask(&mut sender, "GET", &long, b"").await.unwrap().0, 414);
        let mismatch =
            Request::get("http://test.example/hello").header("host", "other.example").body(()).unwrap();
        let (response, _) = sender.clone().ready().await.unwrap().send_request(mismatch, true).unwrap();
        assert_eq!(response.await.unwrap().status(), 400);
        drop(sender);
        driver.await.unwrap().unwrap();
    });
    server.finish();
}

#[test]
fn a_whole_body_ends_its_stream_before_the_app_goes_on() {
    let server = Server::start("behaviours", &["--instances", "8", "--timeout", "5s"]);
    client(async {
        let (mut sender, _driver) = connect(&server).await;
        for (method, chunks, body) in [("GET", 1, "all of it"), ("GET", 2, "all of it"), ("HEAD", 1, "")] {
            for then in ["next,sleep", "close,spin"] {
                let path = format!("/whole-then?200;{chunks};{then}");
                let answer = ask(&mut sender, method, &path, b"").await.unwrap();
                assert_eq!(answer, (200, body.into()), "{path}");
            }
        }
    });
    // The apps never end, and none was stopped yet.
    assert!(!server.log().contains("in time"));
    server.finish();
}

#[test]
fn a_stop_lets_http2_finish_and_says_goodbye() {
    let mut server = Server::start("behaviours", &[]);
    client(async {
        let (mut sender, driver) = connect(&server).await;
        assert_eq!(ask(&mut sender, "GET", "/hello", b"").await.unwrap().0, 200);
        let mut second = sender.clone();
        let running = tokio::spawn(async move { ask(&mut second, "GET", "/sleep?1", b"").await });
        // Once this is answered, the one before it is under way.
        assert_eq!(ask(&mut sender, "GET", "/hello", b"").await.unwrap().0, 200);
        server.signal("TERM");
        server.wait_for_log(&["stopping"]);
        assert_eq!(running.await.unwrap().unwrap(), (200, b"slept".to_vec()));
        driver.await.unwrap().unwrap();
        assert!(ask(&mut sender, "GET", "/hello", b"").await.is_err());
    });
    assert_eq!(server.wait(), Some(0));
}

/// A frame of HTTP/2 as it is.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// GET /hello by indexes and literals of HPACK.
const HELLO: &[u8] = b"\x82\x86\x04\x06/hello\x41\x01x";
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const CONTINUATION: u8 = 9;
const ACK: u8 = 1;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

/// Opens a connection with these settings.
fn raw(server: &Server, settings: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(server.address()).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").unwrap();
    stream.write_all(&frame(SETTINGS, 0, 0, settings)).unwrap();
    stream
}

/// Reads frames until one of `kind` on `stream`, or the end: its payload.
fn wait_for(connection: &mut TcpStream, kind: u8, stream: u32) -> Option<Vec<u8>> {
    loop {
        let mut head = [0; 9];
        connection.read_exact(&mut head).ok()?;
        let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
        connection.read_exact(&mut payload).ok()?;
        if head[3] == kind && u32::from_be_bytes([head[5], head[6], head[7], head[8]]) == stream {
            return Some(payload);
        }
    }
}

/// What a GOAWAY says, if the connection did not just break.
fn goaway_reason(connection: &mut TcpStream) -> Option<u32> {
    let payload = wait_for(connection, GOAWAY, 0)?;
    Some(u32::from_be_bytes(payload[4..8].try_into().unwrap()))
}

#[test]
fn floods_of_http2_frames_end_the_connection() {
    let server = Server::start("behaviours", &[]);
    // Rapid reset (CVE-2023-44487).
    let mut rapid = raw(&server, &[]);
    for index in 0..2000 {
        let stream = index * 2 + 1;
        let pair = [
            frame(HEADERS, END_STREAM | END_HEADERS, stream, HELLO),
            frame(RST_STREAM, 0, stream, &8u32.to_be_bytes()),
        ];
        if rapid.write_all(&pair.concat()).is_err() {
            break;
        }
    }
    assert!(matches!(goaway_reason(&mut rapid), Some(0xb) | None), "not calmed");
    // Continuations without end (CVE-2024-27316).
    let mut endless = raw(&server, &[]);
    endless.write_all(&frame(HEADERS, END_STREAM, 1, HELLO)).unwrap();
    let field = [&b"\x00\x03abc\x7f\x81\x7e"[..], &[b'a'; 254]].concat();
    let mut sent = 0;
    while sent < 64 << 20 && endless.write_all(&frame(CONTINUATION, 0, 1, &field)).is_ok() {
        sent += field.len();
    }
    assert!(sent < 64 << 20, "64 MiB of headers were taken");
    // More headers than allowed are a 431 of one stream.
    client(async {
        let (sender, _driver) = connect(&server).await;
        let mut request = Request::get("http://x/hello");
        for index in 0..40 {
            request = request.header(format!("x-{index}"), "a".repeat(1000));
        }
        let (response, _) =
            sender.clone().ready().await.unwrap().send_request(request.body(()).unwrap(), true).unwrap();
        assert_eq!(response.await.unwrap().status(), 431);
    });
    assert_eq!(server.get("/hello").ok(), "Hello, world!\n");
    server.finish();
}

#[test]
fn a_spent_http2_connection_says_goodbye() {
    let server = Server::start("behaviours", &["--keep-alive-requests", "2"]);
    let mut spent = raw(&server, &[]);
    for stream in [1, 3] {
        spent.write_all(&frame(HEADERS, END_STREAM | END_HEADERS, stream, HELLO)).unwrap();
    }
    assert_eq!(wait_for(&mut spent, GOAWAY, 0).unwrap(), [0x7f, 0xff, 0xff, 0xff, 0, 0, 0, 0]);
    let ping = wait_for(&mut spent, PING, 0).unwrap();
    spent.write_all(&frame(PING, ACK, 0, &ping)).unwrap();
    assert_eq!(wait_for(&mut spent, GOAWAY, 0).unwrap(), [0, 0, 0, 3, 0, 0, 0, 0]);
    // What is left of the responses, and the end.
    let end = spent.read_to_end(&mut Vec::new()).map_err(|error| error.kind());
    assert_ne!(end, Err(std::io::ErrorKind::WouldBlock), "the connection stays open");
    assert_eq!(server.get("/hello").ok(), "Hello, world!\n");
    server.finish();
}

#[test]
fn frames_without_progress_end_the_connection() {
    let server = Server::start("behaviours", &[]);
    let setting = [0, 3, 0, 0, 0, 100];
    let floods: [(&str, Vec<u8>); 6] = [
        ("PING", frame(PING, 0, 0, b"12345678")),
        ("answers to no PING", frame(PING, ACK, 0, b"12345678")),
        ("SETTINGS", frame(SETTINGS, 0, 0, &setting)),
        ("PRIORITY", frame(2, 0, 1, &[0, 0, 0, 0, 1])),
        ("WINDOW_UPDATE", frame(8, 0, 0, &[0, 0, 0, 1])),
        ("unknown frames", frame(0x42, 0, 0, b"")),
    ];
    for (name, flood) in floods {
        let mut client = raw(&server, &[]);
        let mut reader = client.try_clone().unwrap();
        let seen = std::thread::spawn(move || goaway_reason(&mut reader));
        let flood = flood.repeat(100);
        let mut sent = 0;
        // Many more than are allowed at once and become due meanwhile.
        while sent < 1_000_000 && client.write_all(&flood).is_ok() {
            sent += 100;
        }
        assert!(sent < 1_000_000, "{name}: all were taken");
        // PROTOCOL_ERROR, if what came after it has not reset the connection.
        assert!(matches!(seen.join().unwrap(), Some(1) | None), "{name}");
    }
    // Who takes a large response bit by bit grants many windows.
    let mut client = raw(&server, &[]);
    let large = b"\x82\x86\x04\x09/large?32\x41\x01x";
    client.write_all(&frame(HEADERS, END_STREAM | END_HEADERS, 1, large)).unwrap();
    let (mut received, mut granted) = (0, 0);
    while received < 32 << 20 {
        let mut head = [0; 9];
        client.read_exact(&mut head).unwrap();
        let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
        client.read_exact(&mut payload).unwrap();
        if head[3] == 0 && !payload.is_empty() {
            received += payload.len();
            let increment = u32::try_from(payload.len()).unwrap().to_be_bytes();
            let both = [frame(8, 0, 0, &increment), frame(8, 0, 1, &increment)].concat();
            // The last ones may come too late.
            let _ = client.write_all(&both);
            granted += 2;
        }
    }
    assert!(granted > 4000, "only {granted} windows were granted");
    assert_eq!(server.get("/hello").ok(), "Hello, world!\n");
    server.finish();
}

#[test]
fn a_stream_without_a_window_holds_no_instance() {
    let server = Server::start("behaviours", &["--instances", "1", "--client-timeout", "500ms"]);
    // SETTINGS_INITIAL_WINDOW_SIZE = 0: not a byte of a body may be sent.
    let mut stalled = raw(&server, &[0, 4, 0, 0, 0, 0]);
    let large = b"\x82\x86\x04\x09/large?64\x41\x01x";
    stalled.write_all(&frame(HEADERS, END_STREAM | END_HEADERS, 1, large)).unwrap();
    assert!(wait_for(&mut stalled, RST_STREAM, 1).is_some(), "the stream is not reset");
    assert_eq!(server.get("/hello").ok(), "Hello, world!\n");
    server.finish();
}

#[test]
fn idle_http2_connections_are_closed() {
    let server = Server::start("behaviours", &["--keep-alive", "300ms", "--header-timeout", "3s"]);
    // A client that answers the PING hears which request was the last, one
    // that does not is left.
    for answers in [true, false] {
        let mut idle = raw(&server, &[]);
        let hello = frame(HEADERS, END_STREAM | END_HEADERS, 1, HELLO);
        idle.write_all(&hello).unwrap();
        let goaway = wait_for(&mut idle, GOAWAY, 0).unwrap();
        assert_eq!(goaway, [0x7f, 0xff, 0xff, 0xff, 0, 0, 0, 0]);
        let ping = wait_for(&mut idle, PING, 0).unwrap();
        if answers {
            idle.write_all(&frame(PING, ACK, 0, &ping)).unwrap();
            let goaway = wait_for(&mut idle, GOAWAY, 0).unwrap();
            assert_eq!(goaway, [0, 0, 0, 1, 0, 0, 0, 0]);
        }
        assert_eq!(idle.read_to_end(&mut Vec::new()).unwrap_or_default(), 0);
    }
    let mut half = TcpStream::connect(server.address()).unwrap();
    half.write_all(b"PRI * HT").unwrap();
    half.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    assert_eq!(half.read_to_end(&mut Vec::new()).unwrap(), 0);
    server.finish();
}

/// A certificate for `name`, as files; its PEM.
fn certificate(directory: &Path, name: &str) -> String {
    let made = rcgen::generate_simple_self_signed(vec![name.to_owned()]).unwrap();
    std::fs::write(directory.join(format!("{name}.key")), made.signing_key.serialize_pem()).unwrap();
    let pem = made.cert.pem();
    std::fs::write(directory.join(format!("{name}.pem")), &pem).unwrap();
    pem
}

/// Does a handshake with the server for `name`, trusting `root` only.
async fn secure(
    server: &Server,
    name: &str,
    root: &str,
    protocol: &str,
    identity: Option<(&str, &str)>,
) -> std::io::Result<TlsStream<tokio::net::TcpStream>> {
    use rustls_pki_types::pem::PemObject as _;
    use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(root.as_bytes()).unwrap()).unwrap();
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots);
    let mut config = match identity {
        None => builder.with_no_client_auth(),
        Some((certificate, key)) => builder
            .with_client_auth_cert(
                vec![CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap()],
                PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap(),
            )
            .unwrap(),
    };
    config.alpn_protocols = vec![protocol.as_bytes().to_vec()];
    let stream = tokio::net::TcpStream::connect(server.address()).await?;
    let name = ServerName::try_from(name.to_owned()).unwrap();
    TlsConnector::from(Arc::new(config)).connect(name, stream).await
}

/// The environ that the app sees over HTTP/1.1.
async fn environ(mut stream: TlsStream<tokio::net::TcpStream>) -> serde_json::Value {
    stream.write_all(b"GET /show-environ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await.unwrap();
    let mut response = String::new();
    stream.read_to_string(&mut response).await.unwrap();
    serde_json::from_str(response.split_once("\r\n\r\n").unwrap().1).unwrap()
}

fn serve_tls(directory: &Path, names: &[&str], options: &[&str]) -> Server {
    let mut command = wsgi_wasm();
    command.arg("serve").arg(guest("behaviours")).args(["--bind", "127.0.0.1:0"]).args(options);
    for name in names {
        command.arg("--tls-cert").arg(directory.join(format!("{name}.pem")));
        command.arg("--tls-key").arg(directory.join(format!("{name}.key")));
    }
    Server::spawn(&mut command)
}

#[test]
fn tls_chooses_certificates_by_name_and_speaks_both_versions() {
    let directory = tempfile::tempdir().unwrap();
    let a = certificate(directory.path(), "a.example");
    let b = certificate(directory.path(), "b.example");
    let server = serve_tls(directory.path(), &["a.example", "b.example"], &["--bind", "http:127.0.0.1:0"]);
    let lines = server.announced(2);
    assert!(lines[0].starts_with("listening on https://") && lines[1].starts_with("listening on http://"));
    client(async {
        let stream = secure(&server, "a.example", &a, "h2", None).await.unwrap();
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
        let (mut sender, _driver) = speak(stream).await;
        let (_, body) = ask(&mut sender, "GET", "/show-environ", b"").await.unwrap();
        let seen: serde_json::Value = serde_json::from_slice(&body).unwrap();
        assert_eq!((&seen["wsgi.url_scheme"], &seen["HTTPS"]), (&"https".into(), &"on".into()));

        let stream = secure(&server, "b.example", &b, "http/1.1", None).await.unwrap();
        let seen = environ(stream).await;
        assert_eq!(
            (&seen["wsgi.url_scheme"], &seen["SERVER_PROTOCOL"]),
            (&"https".into(), &"HTTP/1.1".into())
        );
        assert!(seen.get("SSL_CLIENT_CERT").is_none());
        // Neither certificate is for this name; the first one is shown.
        assert!(secure(&server, "c.example", &a, "h2", None).await.is_err());
    });
    let mut plain = server.connect();
    plain.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n");
    let mut answer = Vec::new();
    let _ = plain.reader().read_to_end(&mut answer);
    assert!(!answer.starts_with(b"HTTP"), "plain HTTP is served on a TLS port");
    server.finish();
}

#[test]
fn certificates_are_renewed_when_their_files_change() {
    let directory = tempfile::tempdir().unwrap();
    let old = certificate(directory.path(), "a.example");
    let server = serve_tls(directory.path(), &["a.example"], &[]);
    client(secure(&server, "a.example", &old, "h2", None)).unwrap();
    std::fs::write(directory.path().join("a.example.key"), "garbage").unwrap();
    server.wait_for_log(&["old certificates stay in use"]);
    client(secure(&server, "a.example", &old, "h2", None)).unwrap();
    let new = certificate(directory.path(), "a.example");
    server.wait_for_log(&["certificates were renewed"]);
    client(secure(&server, "a.example", &new, "h2", None)).unwrap();
    server.finish();
}

#[test]
fn a_client_may_show_a_certificate() {
    use rcgen::{CertificateParams, IsCa, Issuer, KeyPair};
    let directory = tempfile::tempdir().unwrap();
    let root = certificate(directory.path(), "a.example");
    let authority_key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let authority = params.self_signed(&authority_key).unwrap();
    let file = directory.path().join("clients.pem");
    std::fs::write(&file, authority.pem()).unwrap();
    let issuer = Issuer::new(params, authority_key);
    let key = KeyPair::generate().unwrap();
    let known = CertificateParams::new(vec!["client".to_owned()]).unwrap().signed_by(&key, &issuer).unwrap();
    let server = serve_tls(directory.path(), &["a.example"], &["--tls-client-ca", file.to_str().unwrap()]);
    client(async {
        let identity = (known.pem(), key.serialize_pem());
        let identity = Some((&*identity.0, &*identity.1));
        let seen = environ(secure(&server, "a.example", &root, "http/1.1", identity).await.unwrap()).await;
        assert_eq!(seen["SSL_CLIENT_VERIFY"], "SUCCESS");
        let shown = seen["SSL_CLIENT_CERT"].as_str().unwrap();
        let plain = |pem: &str| pem.split_whitespace().collect::<String>();
        assert_eq!(plain(shown), plain(&known.pem()));
        let seen = environ(secure(&server, "a.example", &root, "http/1.1", None).await.unwrap()).await;
        assert!(seen.get("SSL_CLIENT_VERIFY").is_none());
    });
    server.finish();
    run(wsgi_wasm().arg("serve").arg(guest("behaviours")).args(["--tls-cert", "x", "--tls-key", "y"]))
        .refused(&["x", "help:"]);
}
