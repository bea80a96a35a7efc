//! Where the server listens: addresses as typed, and bound sockets.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpSocket, UnixListener};

use crate::environ::Connection;
use crate::error::UserError;

/// Connections that the kernel keeps until we take them.
pub const BACKLOG: u32 = 1024;

/// An address to listen on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// Address and port, and whether it stays without TLS in any case.
    Tcp(String, bool),
    /// A path.
    Unix(PathBuf),
}

impl Address {
    /// Reads an address as typed.
    ///
    /// # Errors
    ///
    /// A [`UserError`] that says what to write.
    pub fn parse(text: &str) -> Result<Address> {
        let refuse = |reason: &str| {
            UserError::new(format!("can not listen on `{text}`: {reason}"))
                .remedy("write `127.0.0.1:8000`, `[::1]:8000`, `0.0.0.0:0` for any free port, or `unix:PATH`")
        };
        if let Some(path) = text.strip_prefix("unix:") {
            if path.is_empty() {
                return Err(refuse("the path is empty").into());
            }
            return Ok(Address::Unix(path.into()));
        }
        let (text, is_plain) = match text.strip_prefix("http:") {
            Some(address) => (address, true),
            None => (text, false),
        };
        let Some((host, port)) = text.rsplit_once(':') else {
            return Err(refuse("the port is missing").into());
        };
        if port.parse::<u16>().is_err() {
            return Err(refuse("the port is not a number from 0 to 65535").into());
        }
        if host.is_empty() {
            return Err(refuse("the address before the port is missing").into());
        }
        Ok(Address::Tcp(text.to_owned(), is_plain))
    }

    /// Binds the address.
    ///
    /// # Errors
    ///
    /// A [`UserError`] if that is not possible.
    pub async fn listen(&self, with_tls: bool) -> Result<Listener> {
        match self {
            Address::Tcp(address, is_plain) => {
                let listener = bind(address).await.map_err(|error| {
                    let refused = UserError::new(format!("can not listen on `{address}`: {error}"));
                    match error.kind() {
                        io::ErrorKind::AddrInUse => refused
                            .remedy("stop the program that uses the port, or choose another with `--bind`"),
                        io::ErrorKind::PermissionDenied => {
                            refused.remedy("choose a port above 1023, or grant the right to use lower ones")
                        }
                        _ => refused.remedy("choose an address of this machine with `--bind`"),
                    }
                })?;
                Ok(Listener::Tcp(listener, with_tls && !is_plain))
            }
            Address::Unix(path) => {
                remove_stale_socket(path);
                let listener = UnixListener::bind(path).map_err(|error| {
                    let refused =
                        UserError::new(format!("can not listen on `unix:{}`: {error}", path.display()));
                    match error.kind() {
                        io::ErrorKind::AddrInUse => refused.remedy(
                            "stop the server that uses the socket, or remove the file that is in the way",
                        ),
                        _ => refused.remedy("choose a path in a directory that exists and can be written"),
                    }
                })?;
                Ok(Listener::Unix(listener, Some(path.clone())))
            }
        }
    }
}

/// Binds the first of the addresses that `text` stands for and that can be.
async fn bind(text: &str) -> io::Result<TcpListener> {
    let mut failed = io::Error::new(io::ErrorKind::InvalidInput, "the name has no address");
    for address in tokio::net::lookup_host(text).await? {
        match bind_one(address) {
            Ok(listener) => return Ok(listener),
            Err(error) => failed = error,
        }
    }
    Err(failed)
}

/// Binds an address, and one of IPv6 for IPv6 only: else `[::]` would take the
/// port of `0.0.0.0` too, and the two could not be given together.
fn bind_one(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.set_reuseaddr(true)?;
    if matches!(address.ip().to_canonical(), IpAddr::V6(_)) {
        rustix::net::sockopt::set_ipv6_v6only(&socket, true)?;
    }
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Removes a socket that a dead server left behind: one that nobody answers on.
pub fn remove_stale_socket(path: &Path) {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket());
    if is_socket
        && let Err(error) = std::os::unix::net::UnixStream::connect(path)
        && error.kind() == io::ErrorKind::ConnectionRefused
    {
        // If this fails, so does the bind, with a message.
        let _ = std::fs::remove_file(path);
    }
}

/// A bound socket.
pub enum Listener {
    /// A TCP port, and whether it speaks TLS.
    Tcp(TcpListener, bool),
    /// A unix socket, and its path if it is ours to remove.
    Unix(UnixListener, Option<PathBuf>),
}

/// A connection before its first byte.
pub struct Accepted {
    /// The bytes.
    pub stream: Box<dyn Stream>,
    /// What is known of both ends.
    pub connection: Connection,
    /// Whether it begins with a TLS handshake.
    pub is_tls: bool,
}

/// The sockets that the service manager has bound for us, as systemd's
/// `sd_listen_fds` has it. None in most cases.
///
/// Call it before any thread starts: it takes the variables that tell of them
/// out of the environment.
///
/// # Errors
///
/// If one of them is no stream socket.
pub fn inherited() -> Result<Vec<Inherited>> {
    let mut sockets = listenfd::ListenFd::from_env();
    let mut listeners = Vec::new();
    for index in 0..sockets.len() {
        // A socket of the wrong kind is left for the next to try.
        let listener = match sockets.take_tcp_listener(index) {
            Ok(listener) => listener.map(Inherited::Tcp),
            Err(_) => sockets
                .take_unix_listener(index)
                .map_err(|error| {
                    UserError::new(format!("can not use socket {index} of the service manager: {error}"))
                        .remedy("pass TCP or unix stream sockets only (`ListenStream=`)")
                })?
                .map(Inherited::Unix),
        };
        listeners.extend(listener);
    }
    Ok(listeners)
}

/// A socket that another process has bound.
pub enum Inherited {
    /// A TCP port.
    Tcp(std::net::TcpListener),
    /// A unix socket.
    Unix(std::os::unix::net::UnixListener),
}

impl Inherited {
    /// Makes it ours.
    ///
    /// # Errors
    ///
    /// If the socket can not be polled.
    pub fn listen(self, with_tls: bool) -> io::Result<Listener> {
        match self {
            Inherited::Tcp(listener) => {
                listener.set_nonblocking(true)?;
                Ok(Listener::Tcp(TcpListener::from_std(listener)?, with_tls))
            }
            Inherited::Unix(listener) => {
                listener.set_nonblocking(true)?;
                Ok(Listener::Unix(UnixListener::from_std(listener)?, None))
            }
        }
    }
}

impl Listener {
    /// How clients reach it, for people.
    pub fn url(&self) -> String {
        match self {
            Listener::Tcp(listener, is_tls) => {
                let scheme = if *is_tls { "https" } else { "http" };
                match listener.local_addr() {
                    Ok(address) => format!("{scheme}://{address}"),
                    Err(_) => scheme.into(),
                }
            }
            Listener::Unix(_, Some(path)) => format!("unix:{}", path.display()),
            Listener::Unix(_, None) => "unix".into(),
        }
    }

    /// Takes a connection.
    ///
    /// # Errors
    ///
    /// As the system has it.
    pub async fn accept(&self) -> io::Result<Accepted> {
        match self {
            Listener::Tcp(listener, is_tls) => {
                let (stream, peer) = listener.accept().await?;
                // Each piece of a response goes out as it comes; Nagle's
                // algorithm would hold it back for the client's next ACK.
                stream.set_nodelay(true)?;
                let local = stream.local_addr()?;
                let connection = Connection {
                    server_name: local.ip().to_canonical().to_string(),
                    server_port: local.port().to_string(),
                    peer: Some(peer),
                    ..Connection::default()
                };
                Ok(Accepted { stream: Box::new(stream), connection, is_tls: *is_tls })
            }
            Listener::Unix(listener, _) => {
                let (stream, _) = listener.accept().await?;
                // PEP 3333 wants both names; these are what clients of a unix
                // socket send as `Host`.
                let connection = Connection {
                    server_name: "localhost".into(),
                    server_port: "80".into(),
                    ..Connection::default()
                };
                Ok(Accepted { stream: Box::new(stream), connection, is_tls: false })
            }
        }
    }

    /// Takes a connection that is there; none if there is none.
    ///
    /// # Errors
    ///
    /// As the system has it.
    pub async fn accept_waiting(&self) -> io::Result<Option<Accepted>> {
        // The connection is asked for once before the time counts.
        let accepted = tokio::time::timeout(Duration::ZERO, self.accept());
        tokio::task::unconstrained(accepted).await.ok().transpose()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Listener::Unix(_, Some(path)) = self {
            // A socket that nobody listens on only misleads.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// A byte stream of either kind.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_or_refused_with_a_remedy() {
        assert_eq!(Address::parse("127.0.0.1:0").unwrap(), Address::Tcp("127.0.0.1:0".into(), false));
        assert_eq!(Address::parse("[::1]:80").unwrap(), Address::Tcp("[::1]:80".into(), false));
        assert_eq!(Address::parse("unix:/run/x.sock").unwrap(), Address::Unix("/run/x.sock".into()));
        assert_eq!(Address::parse("http:[::1]:80").unwrap(), Address::Tcp("[::1]:80".into(), true));
        for bad in
            ["8000", "http://x", "127.0.0.1", "127.0.0.1:http", "127.0.0.1:70000", ":8000", "unix:", ""]
        {
            let error = Address::parse(bad).unwrap_err();
            assert!(error.is::<UserError>(), "{bad}");
            assert!(error.to_string().contains("help:"), "{bad}");
        }
    }
}
