//! What a guest may reach on the network: nothing, but for TCP connections to
//! what was granted by name, address or range.
//!
//! Names are looked up by the host, and only granted ones. An address that a
//! granted name had is remembered for the instance and checked when the guest
//! connects, so a name server can not redirect a guest: private, loopback and
//! link-local addresses need a grant of their own, as an address or a range
//! that lies among them. One that is so wide that it has them too is not enough.

use std::collections::{HashMap, HashSet, VecDeque};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs as _};
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::task::JoinHandle;
use wasmtime::component::{HasData, Linker, Resource};
use wasmtime_wasi::async_trait;
use wasmtime_wasi::p2::bindings::sockets::ip_name_lookup::{self, ResolveAddressStream};
use wasmtime_wasi::p2::bindings::sockets::network::{
    self as bindings, ErrorCode, IpAddress, IpAddressFamily, IpSocketAddress, Network,
};
use wasmtime_wasi::p2::bindings::sockets::tcp::{self, ShutdownType};
use wasmtime_wasi::p2::bindings::sockets::tcp_create_socket;
use wasmtime_wasi::p2::{
    DynInputStream, DynOutputStream, DynPollable, InputStream, OutputStream, Pollable, SocketError,
    SocketResult, StreamError, StreamResult, TcpSocket, subscribe,
};
use wasmtime_wasi::sockets::{SocketAddrUse, WasiSocketsCtxView};
use wasmtime_wasi::{WasiCtxBuilder, WasiCtxView};

/// Sockets that an instance may have at a time.
const MAX_SOCKETS: usize = 64;
/// The same for all instances of an app: each is a descriptor of the host.
const MAX_SOCKETS_TOGETHER: usize = 256;
/// Addresses that are remembered for an instance.
const MAX_ADDRESSES: usize = 1024;
/// How long a lookup may take.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(10);
/// Lookups under way at a time, of all apps: each takes a thread, until the
/// C library gives up.
static LOOKUPS: LazyLock<Arc<Semaphore>> = LazyLock::new(|| Arc::new(Semaphore::new(64)));
/// The same, for apps that have no other one under way: those of others, whose
/// name servers do not answer, are not in their way.
static FIRST_LOOKUPS: LazyLock<Arc<Semaphore>> = LazyLock::new(|| Arc::new(Semaphore::new(192)));
/// Lookups under way at a time, of one app.
const MAX_LOOKUPS: usize = 4;
/// Stack of a thread that looks up.
const LOOKUP_STACK: usize = 512 << 10;
/// The time that a quota is for.
const PERIOD: Duration = Duration::from_secs(3600);
/// Refusals that an instance may log.
const MAX_REFUSALS: u64 = 20;

/// One grant, as in `--network db.example:5432`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    whom: Whom,
    /// None stands for any.
    port: Option<u16>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Whom {
    /// A name, in lower case.
    Name(String),
    /// All names that end with this, which starts with a dot.
    Below(String),
    /// Addresses whose first bits are those.
    Range(IpAddr, u8),
}

/// The network grants of an app, and what all its instances together have used.
#[derive(Debug)]
pub struct NetworkGrants {
    rules: Vec<Rule>,
    /// Bytes for each [`PERIOD`].
    bytes: u64,
    /// When this one began, and the bytes in it.
    moved: Mutex<(Instant, u64)>,
    lookups: Arc<Semaphore>,
    /// The place of the app in [`FIRST_LOOKUPS`].
    first_lookup: Arc<Semaphore>,
    sockets: Arc<Semaphore>,
}

impl NetworkGrants {
    /// Grants `rules`, and so many `bytes` to send and receive in each hour.
    pub fn new(rules: Vec<Rule>, bytes: u64) -> NetworkGrants {
        NetworkGrants {
            rules,
            bytes,
            moved: Mutex::new((Instant::now(), 0)),
            lookups: Arc::new(Semaphore::new(MAX_LOOKUPS)),
            first_lookup: Arc::new(Semaphore::new(1)),
            sockets: Arc::new(Semaphore::new(MAX_SOCKETS_TOGETHER)),
        }
    }

    /// Counts bytes, and says how many there were before and after in this
    /// period.
    fn count(&self, bytes: usize) -> (u64, u64) {
        let mut moved = self.moved.lock().unwrap_or_else(PoisonError::into_inner);
        if moved.0.elapsed() >= PERIOD {
            *moved = (Instant::now(), 0);
        }
        let before = moved.1;
        moved.1 = before.saturating_add(bytes as u64);
        (before, moved.1)
    }
}

/// What one instance may reach, and how far it has used that.
#[derive(Clone, Debug)]
pub struct Reach(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    app: Arc<str>,
    grants: Arc<NetworkGrants>,
    /// The granted names that had an address.
    found: Mutex<HashMap<IpAddr, HashSet<String>>>,
    /// The sockets that are open, by handle, each with its place among those
    /// of the app.
    sockets: Mutex<HashMap<u32, OwnedSemaphorePermit>>,
    refusals: AtomicU64,
}

impl FromStr for Rule {
    type Err = String;

    fn from_str(text: &str) -> Result<Rule, String> {
        let (whom, port) = text.rsplit_once(':').ok_or(
            "write HOST:PORT, *.DOMAIN:PORT, ADDRESS:PORT or ADDRESS/BITS:PORT, with port * for any",
        )?;
        let port = match port {
            "*" => None,
            port => {
                Some(port.parse().ok().filter(|port| *port > 0).ok_or("the port must be 1 to 65535, or *")?)
            }
        };
        let (address, bits) = match whom.split_once('/') {
            Some((address, bits)) => (address, Some(bits)),
            None => (whom, None),
        };
        let inner = address.strip_prefix('[').and_then(|address| address.strip_suffix(']'));
        let whom = match (inner.unwrap_or(address).parse::<IpAddr>(), bits) {
            (Ok(address @ IpAddr::V6(_)), _) if inner.is_none() => {
                return Err(format!("write IPv6 addresses in brackets: `[{address}]`"));
            }
            (Ok(address), bits) => {
                let most = if address.is_ipv4() { 32 } else { 128 };
                let bits = bits.map_or(Ok(most), str::parse::<u8>).ok().filter(|bits| *bits <= most);
                let bits = bits.ok_or(format!("the bits of a range are 0 to {most}"))?;
                match address.to_canonical() {
                    // `::ffff:10.0.0.0/104` is 10.0.0.0/8.
                    inner if address.is_ipv6() && inner.is_ipv4() && bits >= 96 => {
                        Whom::Range(inner, bits - 96)
                    }
                    _ => Whom::Range(address, bits),
                }
            }
            (Err(_), Some(_)) => return Err("a range needs an address before the slash".into()),
            (Err(_), None) => {
                let name = whom.to_ascii_lowercase();
                let (below, plain) = match name.strip_prefix("*.") {
                    Some(plain) => (true, plain),
                    None => (false, &*name),
                };
                let legal = |part: &str| {
                    !part.is_empty()
                        && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
                };
                if !plain.split('.').all(legal) || plain.len() > 253 {
                    return Err(format!("`{whom}` is no host name"));
                }
                if below { Whom::Below(format!(".{plain}")) } else { Whom::Name(name) }
            }
        };
        Ok(Rule { whom, port })
    }
}

impl Rule {
    fn allows_port(&self, port: u16) -> bool {
        self.port.is_none_or(|granted| granted == port)
    }

    fn covers_name(&self, name: &str) -> bool {
        match &self.whom {
            Whom::Name(granted) => granted == name,
            Whom::Below(suffix) => name.ends_with(&**suffix) && name.len() > suffix.len(),
            Whom::Range(..) => false,
        }
    }

    /// Whether it grants `address`. One that is not public has to be meant:
    /// `0.0.0.0/0` is the internet, and not this machine.
    fn covers_address(&self, address: IpAddr) -> bool {
        let Whom::Range(start, bits) = self.whom else { return false };
        let meant = |(block, width): (IpAddr, u8)| bits >= width && begins_like(block, width, start);
        begins_like(start, bits, address) && reserved(address).is_none_or(meant)
    }
}

/// Whether the first `bits` of both addresses are the same.
fn begins_like(start: IpAddr, bits: u8, address: IpAddr) -> bool {
    let same = |one: u128, other: u128, width: u8| {
        // A shift by the whole width would overflow.
        (one ^ other).checked_shr(u32::from(width.saturating_sub(bits))).unwrap_or(0) == 0
    };
    match (start, address) {
        (IpAddr::V4(start), IpAddr::V4(address)) => {
            same(u128::from(start.to_bits()), u128::from(address.to_bits()), 32)
        }
        (IpAddr::V6(start), IpAddr::V6(address)) => same(start.to_bits(), address.to_bits(), 128),
        _ => false,
    }
}

/// The ranges that nobody on the internet has. Of two that an address is in,
/// the smaller one comes first.
const RESERVED: [(IpAddr, u8); 24] = {
    const fn v4(a: u8, b: u8, c: u8, bits: u8) -> (IpAddr, u8) {
        (IpAddr::V4(Ipv4Addr::new(a, b, c, 0)), bits)
    }
    const fn v6(a: u16, b: u16, h: u16, bits: u8) -> (IpAddr, u8) {
        (IpAddr::V6(Ipv6Addr::new(a, b, 0, 0, 0, 0, 0, h)), bits)
    }
    [
        v4(0, 0, 0, 8),
        v4(10, 0, 0, 8),
        v4(127, 0, 0, 8),
        v4(169, 254, 0, 16),
        v4(172, 16, 0, 12),
        v4(192, 168, 0, 16),
        // Shared by carriers, for protocols, for documentation, for benchmarks.
        v4(100, 64, 0, 10),
        v4(192, 0, 0, 24),
        v4(192, 88, 99, 24),
        v4(192, 0, 2, 24),
        v4(198, 51, 100, 24),
        v4(203, 0, 113, 24),
        v4(198, 18, 0, 15),
        // To many, and to nobody.
        v4(224, 0, 0, 3),
        v6(0, 0, 1, 128),
        v6(0xfc00, 0, 0, 7),
        v6(0xfe80, 0, 0, 10),
        v6(0xff00, 0, 0, 8),
        // Protocols with Teredo, documentation, IPv4 in disguise.
        v6(0x2001, 0, 0, 23),
        v6(0x2001, 0xdb8, 0, 32),
        v6(0x2002, 0, 0, 16),
        // All else but the global ones, 2000::/3.
        v6(0, 0, 0, 3),
        v6(0x4000, 0, 0, 2),
        v6(0x8000, 0, 0, 1),
    ]
};

/// The range that `address` is in if nobody on the internet has it.
fn reserved(address: IpAddr) -> Option<(IpAddr, u8)> {
    RESERVED.into_iter().find(|(start, bits)| begins_like(*start, *bits, address))
}

/// Whether anybody on the internet has this address. What is not surely
/// public is not.
fn is_public(address: IpAddr) -> bool {
    reserved(address).is_none()
}

impl Reach {
    /// What an instance of `app` may reach.
    pub fn new(app: Arc<str>, grants: Arc<NetworkGrants>) -> Reach {
        Reach(Arc::new(Shared {
            app,
            grants,
            found: Mutex::default(),
            sockets: Mutex::default(),
            refusals: AtomicU64::new(0),
        }))
    }

    /// Opens what is granted; without it, WASI has no sockets at all.
    pub fn apply(&self, wasi: &mut WasiCtxBuilder) {
        if self.0.grants.rules.is_empty() {
            return;
        }
        let reach = self.clone();
        wasi.allow_tcp(true).socket_addr_check(move |address, purpose| {
            let allowed = match purpose {
                SocketAddrUse::TcpConnect => reach.allows(address),
                // What the kernel does for a connection.
                SocketAddrUse::TcpBind => address.ip().is_unspecified() && address.port() == 0,
                _ => false,
            };
            Box::pin(async move { allowed })
        });
    }

    fn allows(&self, address: SocketAddr) -> bool {
        // `::ffff:127.0.0.1` is 127.0.0.1 to the kernel.
        let (ip, port) = (address.ip().to_canonical(), address.port());
        let rules = || self.0.grants.rules.iter().filter(|rule| rule.allows_port(port));
        if rules().any(|rule| rule.covers_address(ip)) {
            return true;
        }
        let found = self.found();
        let Some(names) = found.get(&ip) else { return false };
        rules().any(|rule| {
            names.iter().any(|name| {
                // The one name that is always this machine's own.
                let is_own = name == "localhost" && rule.whom == Whom::Name(name.clone());
                rule.covers_name(name) && (is_public(ip) || (is_own && ip.is_loopback()))
            })
        })
    }

    fn found(&self) -> MutexGuard<'_, HashMap<IpAddr, HashSet<String>>> {
        self.0.found.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sockets(&self) -> MutexGuard<'_, HashMap<u32, OwnedSemaphorePermit>> {
        self.0.sockets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says in the log what was refused, so that the operator can grant it.
    fn refuse(&self, what: &str, grant: &str) -> ErrorCode {
        if self.0.refusals.fetch_add(1, Ordering::Relaxed) < MAX_REFUSALS {
            tracing::warn!(app = %self.0.app, "{what} is not granted; `--network {grant}` would allow it");
        }
        ErrorCode::AccessDenied
    }

    /// Looks a granted name up.
    async fn look_up(&self, name: String) -> Result<VecDeque<IpAddr>, ErrorCode> {
        let grants = &self.0.grants;
        let asked = name.clone();
        let lookup = async move {
            // None of them is ever closed. Held until the thread ends, which
            // may be long after nobody waits any more.
            let own = Arc::clone(&grants.lookups).acquire_owned().await;
            let first = Arc::clone(&grants.first_lookup).try_acquire_owned().ok();
            let places = if first.is_some() { &FIRST_LOOKUPS } else { &LOOKUPS };
            let permits = (own, first, Arc::clone(places).acquire_owned().await);
            let (sender, receiver) = oneshot::channel();
            // Not one of the runtime's, of which files have need.
            std::thread::Builder::new().name("lookup".into()).stack_size(LOOKUP_STACK).spawn(move || {
                let found = (&*asked, 0).to_socket_addrs().map(|addresses| addresses.collect::<Vec<_>>());
                drop(permits);
                // Nobody may be waiting any more.
                let _ = sender.send(found);
            })?;
            receiver.await.unwrap_or_else(|error| Err(std::io::Error::other(error)))
        };
        let addresses = match tokio::time::timeout(LOOKUP_TIMEOUT, lookup).await {
            Ok(Ok(addresses)) => addresses.into_iter().map(|address| address.ip().to_canonical()),
            Ok(Err(_)) => return Err(ErrorCode::NameUnresolvable),
            Err(_) => return Err(ErrorCode::TemporaryResolverFailure),
        };
        let mut kept = VecDeque::new();
        let mut private = None;
        for address in addresses {
            let has_own_rule = self.0.grants.rules.iter().any(|rule| rule.covers_address(address));
            if is_public(address) || has_own_rule || (name == "localhost" && address.is_loopback()) {
                let mut found = self.found();
                if found.len() < MAX_ADDRESSES || found.contains_key(&address) {
                    found.entry(address).or_default().insert(name.clone());
                }
                if !kept.contains(&address) {
                    kept.push_back(address);
                }
            } else {
                private = Some(address);
            }
        }
        match private {
            Some(private) if kept.is_empty() => {
                let host = if private.is_ipv6() { format!("[{private}]") } else { private.to_string() };
                Err(self.refuse(
                    &format!("`{name}` has only addresses that are not public, such as {private}, which"),
                    &format!("{host}:PORT"),
                ))
            }
            _ => Ok(kept),
        }
    }

    /// Counts bytes that were sent or received.
    fn count(&self, bytes: usize) -> StreamResult<()> {
        let (before, after) = self.0.grants.count(bytes);
        let granted = self.0.grants.bytes;
        if after <= granted {
            return Ok(());
        }
        if before <= granted {
            tracing::warn!(
                app = %self.0.app,
                "the network quota of this hour is used up; raise it with `--network-quota` or `limits.network`"
            );
        }
        Err(StreamError::LastOperationFailed(wasmtime::format_err!("the network quota is used up")))
    }
}

// === wasi:sockets ===

/// What the functions need of an instance.
pub struct NetworkView<'a> {
    /// Its grants.
    pub reach: &'a Reach,
    /// Its sockets and handles.
    pub wasi: WasiCtxView<'a>,
}

/// Names [`NetworkView`] to the linker.
struct HasNetwork;

impl HasData for HasNetwork {
    type Data<'a> = NetworkView<'a>;
}

/// Links those interfaces of `wasi:sockets` that differ from wasmtime's own.
///
/// # Errors
///
/// If they are linked already and may not be replaced.
pub fn add_to_linker<T: Send + 'static>(
    linker: &mut Linker<T>,
    view: fn(&mut T) -> NetworkView<'_>,
) -> wasmtime::Result<()> {
    ip_name_lookup::add_to_linker::<T, HasNetwork>(linker, view)?;
    tcp_create_socket::add_to_linker::<T, HasNetwork>(linker, view)?;
    tcp::add_to_linker::<T, HasNetwork>(linker, view)
}

/// The addresses of a name, as they come.
struct Lookup {
    task: Option<JoinHandle<Result<VecDeque<IpAddr>, ErrorCode>>>,
    result: Result<VecDeque<IpAddr>, ErrorCode>,
}

impl Drop for Lookup {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

#[async_trait]
impl Pollable for Lookup {
    async fn ready(&mut self) {
        if let Some(task) = &mut self.task {
            self.result = task.await.unwrap_or(Err(ErrorCode::Unknown));
            self.task = None;
        }
    }
}

impl NetworkView<'_> {
    fn inner(&mut self) -> WasiSocketsCtxView<'_> {
        WasiSocketsCtxView { ctx: self.wasi.ctx.sockets(), table: self.wasi.table }
    }
}

impl bindings::Host for NetworkView<'_> {
    fn convert_error_code(&mut self, error: SocketError) -> wasmtime::Result<ErrorCode> {
        error.downcast()
    }

    fn network_error_code(
        &mut self,
        error: Resource<wasmtime::Error>,
    ) -> wasmtime::Result<Option<ErrorCode>> {
        bindings::Host::network_error_code(&mut self.inner(), error)
    }
}

impl bindings::HostNetwork for NetworkView<'_> {
    fn drop(&mut self, network: Resource<Network>) -> wasmtime::Result<()> {
        bindings::HostNetwork::drop(&mut self.inner(), network)
    }
}

impl ip_name_lookup::Host for NetworkView<'_> {
    fn resolve_addresses(
        &mut self,
        network: Resource<Network>,
        name: String,
    ) -> Result<Resource<ResolveAddressStream>, SocketError> {
        self.wasi.table.get(&network)?;
        let bare = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(&name);
        let name = name.strip_suffix('.').unwrap_or(&name).to_ascii_lowercase();
        let lookup = if let Ok(address) = bare.parse::<IpAddr>() {
            // Nobody is asked. Connecting is another matter.
            Lookup { task: None, result: Ok(VecDeque::from([address])) }
        } else if self.reach.0.grants.rules.iter().any(|rule| rule.covers_name(&name)) {
            let reach = self.reach.clone();
            let task = tokio::spawn(async move { reach.look_up(name).await });
            Lookup { task: Some(task), result: Ok(VecDeque::new()) }
        } else {
            // A guest's text: no more of it than a name has, and escaped.
            let shown: String = name.chars().take(253).flat_map(char::escape_default).collect();
            return Err(self.reach.refuse(&format!("looking up `{shown}`"), &format!("{shown}:PORT")).into());
        };
        let lookup = self.wasi.table.push(lookup).map_err(|_| ErrorCode::OutOfMemory)?;
        Ok(Resource::new_own(lookup.rep()))
    }
}

impl ip_name_lookup::HostResolveAddressStream for NetworkView<'_> {
    fn resolve_next_address(
        &mut self,
        stream: Resource<ResolveAddressStream>,
    ) -> Result<Option<IpAddress>, SocketError> {
        let lookup = self.wasi.table.get_mut(&Resource::<Lookup>::new_borrow(stream.rep()))?;
        match &mut lookup.result {
            _ if lookup.task.is_some() => Err(ErrorCode::WouldBlock.into()),
            Ok(addresses) => Ok(addresses.pop_front().map(IpAddress::from)),
            Err(error) => Err((*error).into()),
        }
    }

    fn subscribe(
        &mut self,
        stream: Resource<ResolveAddressStream>,
    ) -> wasmtime::Result<Resource<DynPollable>> {
        subscribe(self.wasi.table, Resource::<Lookup>::new_borrow(stream.rep()))
    }

    fn drop(&mut self, stream: Resource<ResolveAddressStream>) -> wasmtime::Result<()> {
        self.wasi.table.delete(Resource::<Lookup>::new_own(stream.rep()))?;
        Ok(())
    }
}

impl tcp_create_socket::Host for NetworkView<'_> {
    fn create_tcp_socket(&mut self, family: IpAddressFamily) -> SocketResult<Resource<TcpSocket>> {
        if self.reach.sockets().len() >= MAX_SOCKETS {
            return Err(ErrorCode::NewSocketLimit.into());
        }
        let place = Arc::clone(&self.reach.0.grants.sockets).try_acquire_owned();
        let place = place.map_err(|_| ErrorCode::NewSocketLimit)?;
        let socket = tcp_create_socket::Host::create_tcp_socket(&mut self.inner(), family)?;
        self.reach.sockets().insert(socket.rep(), place);
        Ok(socket)
    }
}

impl tcp::Host for NetworkView<'_> {}

/// Functions that are wasmtime's own.
macro_rules! as_in_wasmtime {
    ($(fn $name:ident($($argument:ident: $type:ty),*) -> $result:ty;)*) => {
        $(fn $name(&mut self, socket: Resource<TcpSocket>, $($argument: $type),*) -> $result {
            tcp::HostTcpSocket::$name(&mut self.inner(), socket, $($argument),*)
        })*
    };
}

impl tcp::HostTcpSocket for NetworkView<'_> {
    async fn start_bind(
        &mut self,
        _socket: Resource<TcpSocket>,
        _network: Resource<Network>,
        _address: IpSocketAddress,
    ) -> SocketResult<()> {
        Err(ErrorCode::AccessDenied.into())
    }

    async fn start_listen(&mut self, _socket: Resource<TcpSocket>) -> SocketResult<()> {
        Err(ErrorCode::AccessDenied.into())
    }

    fn start_connect(
        &mut self,
        socket: Resource<TcpSocket>,
        network: Resource<Network>,
        address: IpSocketAddress,
    ) -> SocketResult<()> {
        let to = SocketAddr::from(address);
        if !self.reach.allows(to) {
            return Err(self.reach.refuse(&format!("connecting to {to}"), &to.to_string()).into());
        }
        tcp::HostTcpSocket::start_connect(&mut self.inner(), socket, network, address)
    }

    fn finish_connect(
        &mut self,
        socket: Resource<TcpSocket>,
    ) -> SocketResult<(Resource<DynInputStream>, Resource<DynOutputStream>)> {
        let rep = socket.rep();
        let (input, output) = tcp::HostTcpSocket::finish_connect(&mut self.inner(), socket)?;
        let table = &mut *self.wasi.table;
        let (input, output) = (table.delete(input)?, table.delete(output)?);
        let input: DynInputStream = Box::new(Counted { stream: input, reach: self.reach.clone() });
        let output: DynOutputStream = Box::new(Counted { stream: output, reach: self.reach.clone() });
        let socket = Resource::<TcpSocket>::new_borrow(rep);
        Ok((table.push_child(input, &socket)?, table.push_child(output, &socket)?))
    }

    fn drop(&mut self, socket: Resource<TcpSocket>) -> wasmtime::Result<()> {
        self.reach.sockets().remove(&socket.rep());
        tcp::HostTcpSocket::drop(&mut self.inner(), socket)
    }

    as_in_wasmtime! {
        fn finish_bind() -> SocketResult<()>;
        fn finish_listen() -> SocketResult<()>;
        fn accept() -> SocketResult<(Resource<TcpSocket>, Resource<DynInputStream>, Resource<DynOutputStream>)>;
        fn local_address() -> SocketResult<IpSocketAddress>;
        fn remote_address() -> SocketResult<IpSocketAddress>;
        fn is_listening() -> wasmtime::Result<bool>;
        fn address_family() -> wasmtime::Result<IpAddressFamily>;
        fn set_listen_backlog_size(value: u64) -> SocketResult<()>;
        fn keep_alive_enabled() -> SocketResult<bool>;
        fn set_keep_alive_enabled(value: bool) -> SocketResult<()>;
        fn keep_alive_idle_time() -> SocketResult<u64>;
        fn set_keep_alive_idle_time(value: u64) -> SocketResult<()>;
        fn keep_alive_interval() -> SocketResult<u64>;
        fn set_keep_alive_interval(value: u64) -> SocketResult<()>;
        fn keep_alive_count() -> SocketResult<u32>;
        fn set_keep_alive_count(value: u32) -> SocketResult<()>;
        fn hop_limit() -> SocketResult<u8>;
        fn set_hop_limit(value: u8) -> SocketResult<()>;
        fn receive_buffer_size() -> SocketResult<u64>;
        fn set_receive_buffer_size(value: u64) -> SocketResult<()>;
        fn send_buffer_size() -> SocketResult<u64>;
        fn set_send_buffer_size(value: u64) -> SocketResult<()>;
        fn subscribe() -> wasmtime::Result<Resource<DynPollable>>;
        fn shutdown(how: ShutdownType) -> SocketResult<()>;
    }
}

/// A stream of a connection whose bytes are counted.
struct Counted<S> {
    stream: S,
    reach: Reach,
}

#[async_trait]
impl<S: Pollable> Pollable for Counted<S> {
    async fn ready(&mut self) {
        self.stream.ready().await;
    }
}

#[async_trait]
impl InputStream for Counted<DynInputStream> {
    fn read(&mut self, size: usize) -> StreamResult<Bytes> {
        self.reach.count(0)?;
        let bytes = self.stream.read(size)?;
        self.reach.count(bytes.len())?;
        Ok(bytes)
    }

    async fn cancel(&mut self) {
        self.stream.cancel().await;
    }
}

#[async_trait]
impl OutputStream for Counted<DynOutputStream> {
    fn write(&mut self, bytes: Bytes) -> StreamResult<()> {
        self.reach.count(bytes.len())?;
        self.stream.write(bytes)
    }

    fn flush(&mut self) -> StreamResult<()> {
        self.stream.flush()
    }

    fn check_write(&mut self) -> StreamResult<usize> {
        self.stream.check_write()
    }

    async fn cancel(&mut self) {
        self.stream.cancel().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reach(rules: &[&str]) -> Reach {
        let rules = rules.iter().map(|rule| rule.parse().unwrap()).collect();
        Reach::new("app".into(), Arc::new(NetworkGrants::new(rules, 1000)))
    }

    #[test]
    fn only_what_is_granted_can_be_reached() {
        let reach =
            reach(&["10.1.0.0/16:5432", "192.0.2.7:*", "[fd00::]/8:80", "example.com:443", "localhost:5000"]);
        for (ip, name) in [
            ("93.184.216.34", "example.com"),
            ("169.254.169.254", "example.com"),
            ("127.0.0.1", "example.com"),
            ("127.0.0.1", "localhost"),
            ("10.9.9.9", "localhost"),
        ] {
            reach.found().entry(ip.parse().unwrap()).or_default().insert(name.into());
        }
        for allowed in [
            "10.1.2.3:5432",
            "[::ffff:10.1.2.3]:5432",
            "192.0.2.7:1",
            "[fd12::1]:80",
            "93.184.216.34:443",
            "127.0.0.1:5000",
        ] {
            assert!(reach.allows(allowed.parse().unwrap()), "{allowed}");
        }
        for refused in [
            "10.1.2.3:5433",
            "10.2.0.0:5432",
            "192.0.2.8:1",
            "[fe80::1]:80",
            "93.184.216.34:80",
            "8.8.8.8:443",
            "127.0.0.1:443",
            "127.0.0.2:5000",
            "[::ffff:127.0.0.1]:443",
            "169.254.169.254:443",
            "10.9.9.9:5000",
            "0.0.0.0:5432",
        ] {
            assert!(!reach.allows(refused.parse().unwrap()), "{refused}");
        }
    }

    #[test]
    fn a_wide_range_is_the_internet_only() {
        let wide = reach(&["0.0.0.0/0:*", "[::]/0:*", "192.168.0.0/15:*", "[2000::]/3:*"]);
        for allowed in ["93.184.216.34:443", "192.169.0.1:80", "[2606:4700::1111]:80"] {
            assert!(wide.allows(allowed.parse().unwrap()), "{allowed}");
        }
        for refused in [
            "127.0.0.1:80",
            "0.0.0.0:80",
            "169.254.169.254:80",
            "10.0.0.1:80",
            "172.31.0.1:80",
            "192.168.0.1:80",
            "100.64.0.1:80",
            "224.0.0.1:80",
            "255.255.255.255:80",
            "[::1]:80",
            "[::]:80",
            "[fd00::1]:80",
            "[fe80::1]:80",
            "[ff02::1]:80",
            "[2002:7f00:1::]:80",
            "[64:ff9b::7f00:1]:80",
            "[::ffff:127.0.0.1]:80",
            "[::ffff:169.254.169.254]:80",
            "[::7f00:1]:80",
        ] {
            assert!(!wide.allows(refused.parse().unwrap()), "{refused}");
        }
        // Wide, but not so wide; and the same in disguise.
        let meant = reach(&["10.0.0.0/8:*", "[::ffff:172.16.0.0]/108:*", "[fc00::]/7:*", "[::1]:*"]);
        for allowed in ["10.1.2.3:1", "172.31.0.1:1", "[::ffff:172.16.0.1]:1", "[fd00::1]:1", "[::1]:1"] {
            assert!(meant.allows(allowed.parse().unwrap()), "{allowed}");
        }
        for refused in ["127.0.0.1:1", "[fe80::1]:1", "172.32.0.1:1", "[::2]:1"] {
            assert!(!meant.allows(refused.parse().unwrap()), "{refused}");
        }
        let mapped = reach(&["[::ffff:0.0.0.0]/96:*", "[::ffff:127.0.0.1]:*"]);
        assert!(mapped.allows("127.0.0.1:1".parse().unwrap()));
        assert!(!mapped.allows("127.0.0.2:1".parse().unwrap()));
    }

    #[test]
    fn a_quota_is_for_all_instances() {
        let grants = Arc::new(NetworkGrants::new(Vec::new(), 1000));
        let instances = [Reach::new("app".into(), Arc::clone(&grants)), Reach::new("app".into(), grants)];
        for reach in &instances {
            assert!(reach.count(500).is_ok());
        }
        let next = Reach::new("app".into(), Arc::clone(&instances[0].0.grants));
        assert!(next.count(1).is_err());
        // Until the next hour.
        let hour = Instant::now().checked_sub(PERIOD).unwrap();
        next.0.grants.moved.lock().unwrap().0 = hour;
        assert!(next.count(1000).is_ok() && next.count(1).is_err());
    }

    #[tokio::test]
    async fn lookups_of_others_are_in_nobodys_way() {
        // All are taken, by name servers that do not answer.
        let taken = Arc::clone(&LOOKUPS).acquire_many_owned(64).await.unwrap();
        let reach = reach(&["localhost:80"]);
        assert!(reach.look_up("localhost".into()).await.is_ok());
        // But for those who have one of their own that is not done.
        let own = Arc::clone(&reach.0.grants.first_lookup).acquire_owned().await.unwrap();
        let second = tokio::spawn({
            let reach = reach.clone();
            async move { reach.look_up("localhost".into()).await }
        });
        tokio::task::yield_now().await;
        assert!(!second.is_finished());
        drop((own, taken));
        assert!(second.await.unwrap().is_ok());
    }

    #[test]
    fn names_match_whole_labels() {
        let covers = |rule: &str, name| rule.parse::<Rule>().unwrap().covers_name(name);
        assert!(covers("*.Example.com:443", "a.example.com"));
        assert!(covers("*.example.com:443", "a.b.example.com"));
        assert!(!covers("*.example.com:443", "example.com"));
        assert!(!covers("*.example.com:443", "badexample.com"));
        assert!(!covers("example.com:443", "a.example.com"));
    }

    #[test]
    fn addresses_of_nobody_are_not_public() {
        for private in [
            "0.0.0.0",
            "10.0.0.1",
            "100.64.0.1",
            "127.0.0.1",
            "169.254.169.254",
            "172.16.0.1",
            "192.168.0.1",
            "198.18.0.1",
            "224.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "fe80::1",
            "fd00::1",
            "ff02::1",
            "64:ff9b::7f00:1",
            "2002:7f00:1::",
            "2001::1",
            "2001:db8::1",
        ] {
            assert!(!is_public(private.parse().unwrap()), "{private}");
        }
        for public in ["1.1.1.1", "93.184.216.34", "100.128.0.1", "2606:4700::1111"] {
            assert!(is_public(public.parse().unwrap()), "{public}");
        }
    }

    #[test]
    fn rules_that_mean_nothing_are_refused() {
        for bad in [
            "",
            "host",
            "host:0",
            "host:70000",
            "::1:80",
            "10.0.0.0/33:80",
            "name/8:80",
            "a b:80",
            "*:80",
            "a..b:80",
            "*.:1",
        ] {
            assert!(bad.parse::<Rule>().is_err(), "{bad}");
        }
    }
}
