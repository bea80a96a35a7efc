//! The PROXY protocol, versions 1 and 2, as HAProxy's specification has it:
//! a few bytes before all others, in which a balancer says who the client is.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use tokio::io::{AsyncRead, AsyncReadExt as _};

use crate::environ::Connection;

const SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";
/// The longest line of version 1.
const MAX_LINE: usize = 107;
/// The longest block of version 2 that is taken: addresses and some
/// extensions, which are skipped.
const MAX_BLOCK: u16 = 4096;

/// What a PROXY header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Header {
    /// The balancer speaks for itself, as in a health check.
    Local,
    /// The client, and the address it has connected to.
    Proxied(SocketAddr, SocketAddr),
}

impl Header {
    /// Makes `connection` that of the client.
    pub fn apply(self, connection: &mut Connection) {
        if let Header::Proxied(client, server) = self {
            connection.peer = Some(client);
            connection.server_name = server.ip().to_canonical().to_string();
            connection.server_port = server.port().to_string();
        }
    }
}

/// Reads a header and not a byte more.
///
/// # Errors
///
/// If there is none that is well-formed.
pub async fn read(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Header> {
    let mut start = [0; 12];
    stream.read_exact(&mut start).await?;
    if &start == SIGNATURE {
        let mut rest = [0; 4];
        stream.read_exact(&mut rest).await?;
        let [version_command, family, high, low] = rest;
        let length = u16::from_be_bytes([high, low]);
        if length > MAX_BLOCK {
            return Err(bad("the PROXY header is too long"));
        }
        let mut block = vec![0; usize::from(length)];
        stream.read_exact(&mut block).await?;
        return binary(version_command, family, &block);
    }
    let mut line = start.to_vec();
    // Byte by byte, since what follows is not ours; the kernel has them all.
    while !line.ends_with(b"\r\n") {
        if line.len() >= MAX_LINE || !line.starts_with(b"PROXY ") {
            return Err(bad("there is no PROXY header"));
        }
        line.push(stream.read_u8().await?);
    }
    text(&line[..line.len() - 2])
}

fn text(line: &[u8]) -> io::Result<Header> {
    let line = str::from_utf8(line).map_err(|_| bad("the PROXY header is not ASCII"))?;
    let parts: Vec<_> = line.split(' ').collect();
    match parts[..] {
        ["PROXY", "UNKNOWN", ..] => Ok(Header::Local),
        ["PROXY", family @ ("TCP4" | "TCP6"), client, server, client_port, server_port] => {
            let address = |ip: &str, port: &str| -> Option<SocketAddr> {
                let ip: IpAddr = ip.parse().ok()?;
                let is_plain = port.len() <= 5 && port.bytes().all(|byte| byte.is_ascii_digit());
                let fits = ip.is_ipv4() == (family == "TCP4");
                Some(SocketAddr::new(ip, port.parse().ok()?)).filter(|_| is_plain && fits)
            };
            match (address(client, client_port), address(server, server_port)) {
                (Some(client), Some(server)) => Ok(Header::Proxied(client, server)),
                _ => Err(bad("the PROXY header has no valid address")),
            }
        }
        _ => Err(bad("the PROXY header is not well-formed")),
    }
}

fn binary(version_command: u8, family: u8, block: &[u8]) -> io::Result<Header> {
    match version_command {
        0x20 => return Ok(Header::Local),
        0x21 => {}
        _ => return Err(bad("the PROXY header has an unknown version or command")),
    }
    let port = |at: usize| Some(u16::from_be_bytes(block.get(at..at + 2)?.try_into().ok()?));
    let v4 = |at: usize| Some(IpAddr::V4(Ipv4Addr::from(<[u8; 4]>::try_from(block.get(at..at + 4)?).ok()?)));
    let v6 =
        |at: usize| Some(IpAddr::V6(Ipv6Addr::from(<[u8; 16]>::try_from(block.get(at..at + 16)?).ok()?)));
    let proxied = match family >> 4 {
        1 => (|| Some((SocketAddr::new(v4(0)?, port(8)?), SocketAddr::new(v4(4)?, port(10)?))))(),
        2 => (|| Some((SocketAddr::new(v6(0)?, port(32)?), SocketAddr::new(v6(16)?, port(34)?))))(),
        // Unknown, or a unix socket: nothing that would be an address.
        0 | 3 => return Ok(Header::Local),
        _ => None,
    };
    match proxied {
        Some((client, server)) => Ok(Header::Proxied(client, server)),
        None => Err(bad("the PROXY header has no valid address")),
    }
}

fn bad(reason: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn of(bytes: &[u8]) -> (io::Result<Header>, usize) {
        let mut rest = bytes;
        let header = read(&mut rest).await;
        (header, rest.len())
    }

    fn proxied(client: &str, server: &str) -> Header {
        Header::Proxied(client.parse().unwrap(), server.parse().unwrap())
    }

    #[tokio::test]
    async fn both_versions_name_the_client_and_leave_the_rest() {
        let (header, rest) = of(b"PROXY TCP4 203.0.113.7 192.0.2.1 5000 443\r\nGET /").await;
        assert_eq!(header.unwrap(), proxied("203.0.113.7:5000", "192.0.2.1:443"));
        assert_eq!(rest, 5);
        let (header, _) = of(b"PROXY TCP6 2001:db8::1 2001:db8::2 1 2\r\n").await;
        assert_eq!(header.unwrap(), proxied("[2001:db8::1]:1", "[2001:db8::2]:2"));
        assert_eq!(of(b"PROXY UNKNOWN\r\n").await.0.unwrap(), Header::Local);

        let v4 = [&SIGNATURE[..], &[0x21, 0x11, 0, 12, 1, 2, 3, 4, 5, 6, 7, 8, 0, 80, 1, 0], b"GET"].concat();
        let (header, rest) = of(&v4).await;
        assert_eq!(header.unwrap(), proxied("1.2.3.4:80", "5.6.7.8:256"));
        assert_eq!(rest, 3);
        let local = [&SIGNATURE[..], &[0x20, 0, 0, 3, 9, 9, 9]].concat();
        assert_eq!(of(&local).await.0.unwrap(), Header::Local);
    }

    #[tokio::test]
    async fn anything_else_is_refused() {
        let long = [b"PROXY TCP4 ".to_vec(), vec![b'1'; 200]].concat();
        let wrong_version = [&SIGNATURE[..], &[0x11, 0x11, 0, 0]].concat();
        let short_block = [&SIGNATURE[..], &[0x21, 0x21, 0, 4, 1, 2, 3, 4]].concat();
        let huge_block = [&SIGNATURE[..], &[0x21, 0x11, 0xff, 0xff]].concat();
        for bytes in [
            &b"GET / HTTP/1.1\r\n\r\n"[..],
            b"PROXY TCP4 2001:db8::1 192.0.2.1 1 2\r\n",
            b"PROXY TCP4 1.2.3.4 5.6.7.8 1 99999\r\n",
            b"PROXY TCP4 1.2.3.4 5.6.7.8 +1 2\r\n",
            b"PROXY TCP4 1.2.3.4 5.6.7.8 1\r\n",
            b"PROXY TCP4",
            &long,
            &wrong_version,
            &short_block,
            &huge_block,
        ] {
            assert!(of(bytes).await.0.is_err(), "{:?}", String::from_utf8_lossy(bytes));
        }
    }
}
