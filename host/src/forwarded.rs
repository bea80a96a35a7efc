//! What a proxy in front says about the client, and who may say it.
//!
//! Headers that tell of a client are the oldest way to lie to a web app. They
//! reach an app only from peers that the operator has named; from all others
//! they are removed, whether or not there is a proxy.

use std::borrow::Cow;
use std::net::{IpAddr, SocketAddr};

use http::header::{self, HeaderName, HeaderValue};
use http::request::Parts;
use http::uri::PathAndQuery;
use http::{HeaderMap, Uri};
use ipnet::IpNet;

use crate::environ::Connection;
use crate::error::UserError;
use crate::failure::Failure;
use crate::wire::is_host;

/// Which headers the proxies set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Dialect {
    /// `X-Forwarded-For`, `-Proto`, `-Host` and `-Prefix`.
    #[default]
    XForwarded,
    /// `Forwarded` (RFC 7239).
    Forwarded,
}

/// The peers that may speak for a client, and how.
#[derive(Clone, Debug)]
pub struct Proxies {
    networks: Vec<IpNet>,
    unix: bool,
    dialect: Dialect,
    /// Proxies that a request passes, each of which adds one element.
    hops: usize,
}

impl Proxies {
    /// Reads what the operator has typed: networks, addresses, or `unix`.
    ///
    /// # Errors
    ///
    /// A [`UserError`] if one is neither.
    pub fn new(trusted: &[String], dialect: Dialect, hops: usize) -> Result<Proxies, UserError> {
        let mut proxies = Proxies { networks: Vec::new(), unix: false, dialect, hops };
        for text in trusted {
            if text == "unix" {
                proxies.unix = true;
                continue;
            }
            let network = text.parse::<IpNet>().ok().or_else(|| Some(text.parse::<IpAddr>().ok()?.into()));
            proxies.networks.push(network.ok_or_else(|| {
                UserError::new(format!("can not trust `{text}`: it is not a network"))
                    .remedy("write `10.0.0.0/8`, `192.0.2.1`, `2001:db8::/32` or `unix`")
            })?);
        }
        Ok(proxies)
    }

    /// Whether this peer may say who the client is. None is a unix socket.
    pub fn trusts(&self, peer: Option<IpAddr>) -> bool {
        match peer.map(|peer| peer.to_canonical()) {
            None => self.unix,
            Some(peer) => self.networks.iter().any(|network| network.contains(&peer)),
        }
    }

    /// Applies what the proxies say to the request, and removes what nobody
    /// may say. Returns the connection as the app should see it.
    ///
    /// # Errors
    ///
    /// If a trusted proxy passes on something that is not well-formed.
    pub fn apply<'a>(
        &self,
        is_trusted: bool,
        parts: &mut Parts,
        connection: &'a Connection,
    ) -> Result<Cow<'a, Connection>, Failure> {
        let told: Vec<HeaderName> =
            parts.headers.keys().filter(|name| is_about_client(name)).cloned().collect();
        if told.is_empty() {
            return Ok(Cow::Borrowed(connection));
        }
        if !is_trusted {
            for name in told {
                parts.headers.remove(name);
            }
            return Ok(Cow::Borrowed(connection));
        }
        for name in told {
            // What our proxies do not set may be what a client has sent.
            let is_theirs = match self.dialect {
                Dialect::XForwarded => OURS.contains(&name.as_str()),
                Dialect::Forwarded => name == header::FORWARDED,
            };
            if !is_theirs {
                parts.headers.remove(name);
            }
        }
        let said = match self.dialect {
            Dialect::XForwarded => x_forwarded(&mut parts.headers, self.hops)?,
            Dialect::Forwarded => forwarded(&mut parts.headers, self.hops)?,
        };
        let mut seen = connection.clone();
        if let Some(client) = said.client {
            seen.peer = Some(client);
        }
        if let Some(is_https) = said.is_https {
            seen.is_https = is_https;
        }
        if let Some(prefix) = said.prefix {
            seen.prefix = prefix;
        }
        if let Some(host) = said.host {
            if !is_host(host.as_bytes()) {
                return Err(Failure::BadRequest("the forwarded host is not well-formed"));
            }
            let host = HeaderValue::from_str(&host)
                .map_err(|_| Failure::BadRequest("the forwarded host is not well-formed"))?;
            parts.headers.insert(header::HOST, host);
            // An authority in the target would count instead.
            if parts.uri.authority().is_some() {
                let target = parts.uri.path_and_query().cloned();
                parts.uri = Uri::from(target.unwrap_or(PathAndQuery::from_static("/")));
            }
        }
        Ok(Cow::Owned(seen))
    }
}

/// What the proxies of the `x-forwarded` dialect set.
const OURS: &[&str] = &["x-forwarded-for", "x-forwarded-proto", "x-forwarded-host", "x-forwarded-prefix"];

/// Whether a header says who or where the client is.
fn is_about_client(name: &HeaderName) -> bool {
    let name = name.as_str();
    name.starts_with("x-forwarded-")
        || matches!(
            name,
            "forwarded" | "x-real-ip" | "x-client-ip" | "x-cluster-client-ip" | "true-client-ip"
        )
}

/// What was said of the client.
#[derive(Debug, Default, PartialEq, Eq)]
struct Said {
    client: Option<SocketAddr>,
    is_https: Option<bool>,
    host: Option<String>,
    prefix: Option<String>,
}

/// Reads the element that the outermost of `hops` proxies has added: the one
/// so far from the right. What is left of it came from the client, and is
/// taken away.
fn x_forwarded(headers: &mut HeaderMap, hops: usize) -> Result<Said, Failure> {
    let mut element = |name: &'static str| -> Result<Option<String>, Failure> {
        let mut all = Vec::new();
        for value in headers.get_all(name) {
            let text = value.to_str().map_err(|_| bad())?;
            all.extend(text.split(',').map(|text| text.trim().to_owned()));
        }
        let theirs = theirs(all, hops);
        pass_on(headers, HeaderName::from_static(name), &theirs)?;
        Ok(theirs.into_iter().next().filter(|text| !text.is_empty()))
    };
    let prefix = match element("x-forwarded-prefix")? {
        Some(prefix) => Some(mount(&prefix)?),
        None => None,
    };
    Ok(Said {
        client: element("x-forwarded-for")?.and_then(|text| address(&text)),
        is_https: element("x-forwarded-proto")?.and_then(|text| scheme(&text)),
        host: element("x-forwarded-host")?,
        prefix,
    })
}

/// RFC 7239 section 4.
fn forwarded(headers: &mut HeaderMap, hops: usize) -> Result<Said, Failure> {
    let mut elements = Vec::new();
    for value in headers.get_all(header::FORWARDED) {
        let mut rest = value.to_str().map_err(|_| bad())?;
        loop {
            let (said, after) = forwarded_element(rest)?;
            let text = rest.strip_suffix(after.unwrap_or_default()).unwrap_or(rest);
            elements.push((said, text.trim_end_matches(',').trim().to_owned()));
            match after {
                Some(after) => rest = after,
                None => break,
            }
        }
    }
    let (mut said, texts): (Vec<_>, Vec<_>) = theirs(elements, hops).into_iter().unzip();
    pass_on(headers, header::FORWARDED, &texts)?;
    Ok(if said.is_empty() { Said::default() } else { said.swap_remove(0) })
}

/// The elements that the last `hops` proxies have added; none if there are
/// less, for who knows which of them has added none.
fn theirs<T>(mut elements: Vec<T>, hops: usize) -> Vec<T> {
    match elements.len().checked_sub(hops) {
        Some(index) => elements.split_off(index),
        None => Vec::new(),
    }
}

/// Leaves only these elements of a header.
fn pass_on(headers: &mut HeaderMap, name: HeaderName, elements: &[String]) -> Result<(), Failure> {
    if elements.is_empty() {
        headers.remove(name);
    } else {
        headers.insert(name, HeaderValue::from_str(&elements.join(", ")).map_err(|_| bad())?);
    }
    Ok(())
}

/// Reads `for=1.2.3.4; proto=https` up to a comma; what follows that, if any.
fn forwarded_element(text: &str) -> Result<(Said, Option<&str>), Failure> {
    let mut said = Said::default();
    let mut rest = text.trim_start();
    loop {
        let end = rest.find(['=', ';', ',']).unwrap_or(rest.len());
        let name = rest[..end].trim();
        rest = &rest[end..];
        if let Some(after) = rest.strip_prefix('=') {
            let (value, after) = token_or_quoted(after)?;
            rest = after.trim_start();
            match &*name.to_ascii_lowercase() {
                "for" => said.client = address(&value),
                "proto" => said.is_https = scheme(&value),
                "host" => said.host = Some(value),
                _ => {}
            }
        } else if !name.is_empty() {
            return Err(bad());
        }
        match rest.as_bytes() {
            [] => return Ok((said, None)),
            [b',', ..] => return Ok((said, Some(&rest[1..]))),
            [b';', ..] => rest = rest[1..].trim_start(),
            _ => return Err(bad()),
        }
    }
}

/// A token, or what a quoted string stands for, and what follows it.
fn token_or_quoted(text: &str) -> Result<(String, &str), Failure> {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find([';', ',', ' ', '\t']).unwrap_or(text.len());
        return Ok((text[..end].to_owned(), &text[end..]));
    };
    let mut value = String::new();
    let mut characters = quoted.char_indices();
    while let Some((index, character)) = characters.next() {
        match character {
            '"' => return Ok((value, &quoted[index + 1..])),
            '\\' => value.push(characters.next().ok_or(bad())?.1),
            character => value.push(character),
        }
    }
    Err(bad())
}

/// `1.2.3.4`, `1.2.3.4:567`, `2001:db8::1`, `[2001:db8::1]` or
/// `[2001:db8::1]:567`. None for `unknown` and for made-up names.
fn address(text: &str) -> Option<SocketAddr> {
    if let Ok(address) = text.parse::<SocketAddr>() {
        return Some(address);
    }
    let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    Some(SocketAddr::new(bare.parse().ok()?, 0))
}

fn scheme(text: &str) -> Option<bool> {
    match text {
        text if text.eq_ignore_ascii_case("https") => Some(true),
        text if text.eq_ignore_ascii_case("http") => Some(false),
        _ => None,
    }
}

/// A path that an app is mounted at, without a slash at its end.
fn mount(text: &str) -> Result<String, Failure> {
    let path = text.trim_end_matches('/');
    let is_plain = path.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"/-._~".contains(&byte));
    let is_path = path.is_empty() || path.starts_with('/');
    if !is_plain || !is_path || path.contains("//") || path.split('/').any(|part| part == ".." || part == ".")
    {
        return Err(Failure::BadRequest("the forwarded prefix is not a plain path"));
    }
    Ok(path.to_owned())
}

fn bad() -> Failure {
    Failure::BadRequest("the headers of the proxy are not well-formed")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, HeaderValue::from_static(value));
        }
        headers
    }

    #[test]
    fn the_element_of_the_outermost_proxy_counts() {
        let sent = headers(&[
            ("x-forwarded-for", "6.6.6.6, 203.0.113.7"),
            ("x-forwarded-for", "10.0.0.2"),
            ("x-forwarded-proto", "https"),
            ("x-forwarded-prefix", "/shop/"),
        ]);
        let of = |hops| {
            let mut headers = sent.clone();
            let said = x_forwarded(&mut headers, hops).unwrap();
            let left = headers.get("x-forwarded-for").map(|value| value.to_str().unwrap().to_owned());
            assert!(headers.get_all("x-forwarded-for").iter().count() < 2);
            (said, left, headers.contains_key("x-forwarded-proto"))
        };
        let (one, left, _) = of(1);
        assert_eq!(one.client, Some("10.0.0.2:0".parse().unwrap()));
        assert_eq!((one.is_https, one.prefix.as_deref()), (Some(true), Some("/shop")));
        assert_eq!(left.as_deref(), Some("10.0.0.2"));
        let (two, left, has_proto) = of(2);
        assert_eq!(two.client, Some("203.0.113.7:0".parse().unwrap()));
        assert_eq!(left.as_deref(), Some("203.0.113.7, 10.0.0.2"));
        // One proxy of two has set it: that may have been the client.
        assert_eq!((two.is_https, has_proto), (None, false));
        assert_eq!(of(9), (Said::default(), None, false));
    }

    #[test]
    fn forwarded_is_read_as_its_rfc_says() {
        let of = |text: &'static str| forwarded(&mut headers(&[("forwarded", text)]), 1);
        let said =
            of(r#"for=6.6.6.6, For="[2001:db8:cafe::17]:4711" ; PROTO=https;host="a\.example:8";by=x"#);
        let said = said.unwrap();
        assert_eq!(said.client, Some("[2001:db8:cafe::17]:4711".parse().unwrap()));
        assert_eq!((said.is_https, said.host.as_deref()), (Some(true), Some("a.example:8")));
        assert_eq!(of("for=unknown").unwrap(), Said::default());
        assert_eq!(of("for=_hidden;proto=gopher").unwrap(), Said::default());
        let mut chain = headers(&[
            ("forwarded", "for=6.6.6.6;by=\"a,b\", for=203.0.113.7 ; proto=https"),
            ("forwarded", "for=\"[2001:db8::1]\" , for=10.0.0.2"),
        ]);
        assert_eq!(forwarded(&mut chain, 3).unwrap().client, Some("203.0.113.7:0".parse().unwrap()));
        let left: Vec<_> = chain.get_all("forwarded").iter().collect();
        assert_eq!(left, ["for=203.0.113.7 ; proto=https, for=\"[2001:db8::1]\", for=10.0.0.2"]);
        for broken in ["for", "for=\"1.2.3.4", "for=1.2.3.4 x", "for=\"a\"b", "for=\"a\\"] {
            assert!(of(broken).is_err(), "{broken}");
        }
    }

    #[test]
    fn prefixes_are_plain_paths() {
        for good in ["", "/", "/a", "/a/b-c_d.e/"] {
            mount(good).unwrap();
        }
        for bad in ["a", "//a", "/a//b", "/a/../b", "/a%2e", "/a b", "/a?b", "http://x"] {
            assert!(mount(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn networks_are_read_or_refused() {
        let of = |texts: &[&str]| {
            Proxies::new(
                &texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>(),
                Dialect::XForwarded,
                1,
            )
        };
        let proxies = of(&["10.0.0.0/8", "2001:db8::1", "unix"]).unwrap();
        assert!(proxies.trusts(Some("::ffff:10.1.2.3".parse().unwrap())));
        assert!(proxies.trusts(Some("2001:db8::1".parse().unwrap())));
        assert!(proxies.trusts(None));
        assert!(!proxies.trusts(Some("11.0.0.1".parse().unwrap())));
        assert!(!of(&[]).unwrap().trusts(None));
        assert!(of(&["10.0.0.0/33"]).unwrap_err().to_string().contains("help:"));
    }
}
