//! Where the server listens: addresses as typed, and bound sockets.

use std::io;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};

use anyhow::Result;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};

use crate::environ::Connection;
use crate::error::UserError;

/// An address to listen on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    Tcp(String),
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
        let Some((host, port)) = text.rsplit_once(':') else {
            return Err(refuse("the port is missing").into());
        };
        if port.parse::<u16>().is_err() {
            return Err(refuse("the port is not a number from 0 to 65535").into());
        }
        if host.is_empty() {
            return Err(refuse("the address before the port is missing").into());
        }
        Ok(Address::Tcp(text.to_owned()))
    }

    /// Binds the address.
    ///
    /// # Errors
    ///
    /// A [`UserError`] if that is not possible.
    pub async fn listen(&self) -> Result<Listener> {
        match self {
            Address::Tcp(address) => {
                let listener = TcpListener::bind(address).await.map_err(|error| {
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
                Ok(Listener::Tcp(listener))
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
                Ok(Listener::Unix(listener, path.clone()))
            }
        }
    }
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
    Tcp(TcpListener),
    Unix(UnixListener, PathBuf),
}

impl Listener {
    /// How clients reach it, for people.
    pub fn url(&self) -> String {
        match self {
            Listener::Tcp(listener) => match listener.local_addr() {
                Ok(address) => format!("http://{address}"),
                Err(_) => "http".into(),
            },
            Listener::Unix(_, path) => format!("unix:{}", path.display()),
        }
    }

    /// Takes a connection.
    ///
    /// # Errors
    ///
    /// As the system has it.
    pub async fn accept(&self) -> io::Result<(Box<dyn Stream>, Connection)> {
        match self {
            Listener::Tcp(listener) => {
                let (stream, peer) = listener.accept().await?;
                // Each piece of a response goes out as it comes; Nagle's
                // algorithm would hold it back for the client's next ACK.
                stream.set_nodelay(true)?;
                let local = stream.local_addr()?;
                let connection = Connection {
                    server_name: local.ip().to_canonical().to_string(),
                    server_port: local.port().to_string(),
                    peer: Some(peer),
                };
                Ok((Box::new(stream), connection))
            }
            Listener::Unix(listener, _) => {
                let (stream, _) = listener.accept().await?;
                // PEP 3333 wants both names; these are what clients of a unix
                // socket send as `Host`.
                let connection =
                    Connection { server_name: "localhost".into(), server_port: "80".into(), peer: None };
                Ok((Box::new(stream), connection))
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Listener::Unix(_, path) = self {
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
        assert_eq!(Address::parse("127.0.0.1:0").unwrap(), Address::Tcp("127.0.0.1:0".into()));
        assert_eq!(Address::parse("[::1]:80").unwrap(), Address::Tcp("[::1]:80".into()));
        assert_eq!(Address::parse("unix:/run/x.sock").unwrap(), Address::Unix("/run/x.sock".into()));
        for bad in ["8000", "127.0.0.1", "127.0.0.1:http", "127.0.0.1:70000", ":8000", "unix:", ""] {
            let error = Address::parse(bad).unwrap_err();
            assert!(error.is::<UserError>(), "{bad}");
            assert!(error.to_string().contains("help:"), "{bad}");
        }
    }
}
