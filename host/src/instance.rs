//! One guest: a store with its grants and limits, and the calls into it.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use wasmtime::component::{HasSelf, Linker, ResourceTable};
use wasmtime::{Engine, ResourceLimiter, Store, StoreContextMut, UpdateDeadline, WasmBacktrace};
use wasmtime_wasi::{WasiCtx, WasiCtxBuilder, WasiCtxView, WasiView};

use crate::clock::{Clock, Elapsed};
use crate::code::Code;
use crate::engine::{HOSTCALL_FUEL, MAX_RESOURCES};
use crate::exchange::{Exchange, Head, SendError};
use crate::failure::Failure;
use crate::file_part::FilePart;
use crate::files::host::FileView;
use crate::files::{self, FileSpace, Files};
use crate::footprint::{self, Footprint, Held};
use crate::guest_log::{GuestLog, LineBudget, Printable};
use crate::key_derivation::{self, Derivations, Derived, Digest, Refusal};
use crate::network::{self, NetworkGrants, NetworkView, Reach};
use crate::random;
use crate::request_id::RequestId;
use crate::scheduler::{Share, Starting, Turns};

mod bindings {
    //! The WIT contract as Rust types and traits.
    #![allow(missing_docs, unreachable_pub, reason = "generated; the WIT file has the documentation")]

    wasmtime::component::bindgen!({
        path: "../wit",
        world: "application",
        imports: { default: async },
        exports: { default: async },
    });
}

use bindings::wsgi_wasm::gateway::{deadline, key_derivation as wit_key_derivation, request_body, response};

/// Bytes of a request body that go to a guest in one call at most.
const MAX_READ: u32 = 1 << 20;
/// Time that a guest may take to start. Ours does nothing then; one that never
/// comes to an end would hold up the server's start, or a request.
const START_TIMEOUT: Duration = Duration::from_secs(5);
/// Bytes of a trap's reason that are logged: a guest may have words in it.
const MAX_REASON: usize = 500;
/// Elements that all tables of an instance may have together.
const MAX_TABLE_ELEMENTS: usize = 100_000;
/// Bytes of an element: a reference to a function.
const TABLE_ELEMENT: u64 = 8;

/// What one app's instances may use.
#[derive(Clone, Debug)]
pub struct Grants {
    /// The app's name in the log.
    pub name: Arc<str>,
    /// Linear memory of an instance in bytes.
    pub memory: usize,
    /// Environment variables.
    pub environment: Vec<(String, String)>,
    /// Mounted directories.
    pub files: Arc<Files>,
    /// The app's part in the use of the processors.
    pub share: Arc<Share>,
    /// What the app holds of the host's memory.
    pub footprint: Arc<Footprint>,
    /// What may be reached on the network.
    pub network: Arc<NetworkGrants>,
    /// How much the app may log.
    pub log: Arc<LineBudget>,
    /// The app's part in the key derivations.
    pub derivations: Arc<Derivations>,
}

/// An app's code, linked with the host and ready to be instantiated.
#[derive(Clone)]
pub struct Program {
    engine: Engine,
    linked: bindings::ApplicationPre<HostState>,
}

impl Program {
    /// Links `code` with the host and, if it is shared, with the app's own
    /// part.
    ///
    /// # Errors
    ///
    /// If it does not export our world, or imports what the host does not have.
    pub fn link(engine: &Engine, code: &Code) -> wasmtime::Result<Program> {
        let mut linker = Linker::<HostState>::new(engine);
        link_wasi(&mut linker)?;
        bindings::Application::add_to_linker::<_, HasSelf<_>>(&mut linker, |state| state)?;
        if let Some(tenant) = &code.tenant {
            linker.root().module(wsgi_wasm_skeleton::TENANT, tenant)?;
        }
        let linked = bindings::ApplicationPre::new(linker.instantiate_pre(&code.component)?)?;
        Ok(Program { engine: engine.clone(), linked })
    }
}

/// Links WASI: wasmtime's own, but for the files, what checks the network, and random bytes.
fn link_wasi(linker: &mut Linker<HostState>) -> wasmtime::Result<()> {
    wasmtime_wasi::p2::add_to_linker_async(linker)?;
    linker.allow_shadowing(true);
    files::host::add_to_linker(linker, |state| FileView {
        space: &mut state.space,
        table: &mut state.resources,
    })?;
    network::add_to_linker(linker, |state| NetworkView {
        reach: &state.reach,
        wasi: WasiCtxView { ctx: &mut state.wasi, table: &mut state.resources },
    })?;
    random::add_to_linker(linker)?;
    linker.allow_shadowing(false);
    Ok(())
}

/// Where a guest's standard streams go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Streams {
    /// Output becomes lines of the log; there is no input.
    Log,
    /// The host's own streams, for a one-off command.
    Inherit,
}

/// A live guest.
pub struct Instance {
    store: Store<HostState>,
    guest: bindings::Application,
    start_time: Duration,
    requests: u64,
}

/// What a guest answered.
#[derive(Debug)]
pub enum Reply {
    /// The whole response.
    Complete(Head, Bytes),
    /// The response went through the exchange.
    Streamed,
}

impl Instance {
    /// Makes a fresh instance of `program`.
    ///
    /// # Errors
    ///
    /// If the program needs more than its grants, does not start, or the pool
    /// is full.
    pub async fn new(program: &Program, grants: &Grants, streams: Streams) -> wasmtime::Result<Instance> {
        let log = GuestLog::new(Arc::clone(&grants.name), Arc::clone(&grants.log));
        let mut wasi = WasiCtxBuilder::new();
        wasi.envs(&grants.environment).max_random_size(random::MAX_BYTES);
        match streams {
            Streams::Log => wasi.stdout(log.clone()).stderr(log.clone()),
            Streams::Inherit => wasi.inherit_stdio(),
        };
        let reach = Reach::new(Arc::clone(&grants.name), Arc::clone(&grants.network));
        reach.apply(&mut wasi);
        let wasi = wasi.build();
        let mut resources = ResourceTable::new();
        resources.set_max_capacity(MAX_RESOURCES);
        let state = HostState {
            wasi,
            resources,
            limits: Limits {
                memory: grants.memory,
                memory_used: 0,
                table_elements_used: 0,
                held: grants.footprint.hold(footprint::INSTANCE),
            },
            clock: Clock::new(),
            turns: Turns::new(&grants.share),
            log,
            derivations: Arc::clone(&grants.derivations),
            exchange: None,
            space: grants.files.space(&grants.footprint),
            reach,
        };
        let mut store = Store::new(&program.engine, state);
        store.limiter(|state| &mut state.limits);
        store.set_hostcall_fuel(HOSTCALL_FUEL);
        store.set_epoch_deadline(1);
        store.epoch_deadline_callback(on_epoch);
        // A component may run code of its own here.
        let (clock, turns) = (store.data().clock.clone(), Arc::clone(&store.data().turns));
        clock.start(Some(START_TIMEOUT), None);
        let started = clock.enforce(program.linked.instantiate_async(&mut store), &Starting(&turns)).await;
        let start_time = Duration::from_micros(clock.cpu_used());
        clock.start(None, None);
        match started {
            Ok(guest) => Ok(Instance { store, guest: guest?, start_time, requests: 0 }),
            Err(Elapsed) => Err(Elapsed.into()),
        }
    }

    /// Lets the guest answer one request within `limit` of its own time and
    /// `cpu` of processor time.
    ///
    /// After [`Failure::Trap`] and [`Failure::Timeout`], or if the future is
    /// dropped, the instance is broken and must be dropped too.
    ///
    /// # Errors
    ///
    /// Why there is no response, or not a whole one.
    pub async fn handle(
        &mut self,
        request: RequestId,
        environ: &[u8],
        body: &[u8],
        exchange: Exchange,
        (limit, cpu): (Duration, Option<Duration>),
    ) -> Result<Reply, Failure> {
        self.requests += 1;
        let state = self.store.data_mut();
        state.log.begin(request);
        state.exchange = Some(exchange);
        let (clock, turns) = (state.clock.clone(), Arc::clone(&state.turns));
        clock.start(Some(limit), cpu);
        self.store.set_epoch_deadline(1);
        let handler = self.guest.wsgi_wasm_gateway_handler();
        let call = handler.call_handle(&mut self.store, environ, body);
        let outcome = clock.enforce(call, &*turns).await;
        let state = self.store.data_mut();
        let outcome = match outcome {
            Ok(Ok(returned)) => Ok(returned),
            Ok(Err(error)) if error.is::<Elapsed>() => Err(Failure::Timeout),
            Err(Elapsed) => Err(Failure::Timeout),
            Ok(Err(trap)) => {
                let (reason, frames) = explain(&trap);
                state.log.explain(&format!("the guest trapped: {reason}\n{frames}"));
                Err(Failure::Trap)
            }
        };
        state.log.end();
        let exchange = state.exchange.take().ok_or(Failure::Trap)?;
        let returned = outcome?;
        if returned.is_empty() {
            return match exchange.conclude() {
                Ok(()) => Ok(Reply::Streamed),
                // It did what it was told.
                Err(Failure::App) if clock.was_told() => Err(Failure::Timeout),
                Err(failure) => Err(failure),
            };
        }
        if exchange.has_started() {
            return Err(Failure::BadResponse("a response was both streamed and returned"));
        }
        let (head, body) = exchange.whole(returned)?;
        Ok(Reply::Complete(head, body))
    }

    /// Lets the guest run a command and returns its exit status.
    ///
    /// # Errors
    ///
    /// If the guest traps, or runs longer than `limit`.
    pub async fn run_command(
        &mut self,
        arguments: &[String],
        limit: Option<Duration>,
    ) -> wasmtime::Result<u8> {
        let clock = self.store.data().clock.clone();
        clock.start(limit, None);
        self.store.set_epoch_deadline(1);
        let command = self.guest.wsgi_wasm_gateway_command();
        let turns = Arc::clone(&self.store.data().turns);
        let run = command.call_run(&mut self.store, arguments);
        let status = clock.enforce(run, &*turns).await.map_err(wasmtime::Error::from)?;
        match status {
            // It did what it was told.
            Ok(1..) if clock.was_told() => Err(Elapsed.into()),
            status => status,
        }
    }

    /// Its clock.
    pub fn clock(&self) -> Clock {
        self.store.data().clock.clone()
    }

    /// The processor time that its start took.
    pub fn start_time(&self) -> Duration {
        self.start_time
    }

    /// How many requests the instance has worked on.
    pub fn requests(&self) -> u64 {
        self.requests
    }

    /// Linear memory in use, in bytes.
    pub fn memory_used(&self) -> usize {
        self.store.data().limits.memory_used
    }
}

/// Why a guest trapped, and where. Names in it are the guest's own, and so are
/// parts of some reasons.
pub fn explain(trap: &wasmtime::Error) -> (String, String) {
    let reason = Printable(&trap.root_cause().to_string(), MAX_REASON).to_string();
    let frames = trap.downcast_ref::<WasmBacktrace>().map(ToString::to_string).unwrap_or_default();
    (reason, frames)
}

/// Runs in the guest's fiber at the first loop or call after each tick: other
/// tasks of this thread get their turn, and a guest without time left stops.
fn on_epoch(mut store: StoreContextMut<'_, HostState>) -> wasmtime::Result<UpdateDeadline> {
    let state = store.data_mut();
    if state.clock.passed() {
        return Err(Elapsed.into());
    }
    let is_over = state.turns.is_over(state.clock.cpu_used());
    Ok(if is_over { UpdateDeadline::Yield(1) } else { UpdateDeadline::Continue(1) })
}

/// What the host keeps for one instance.
pub struct HostState {
    wasi: WasiCtx,
    resources: ResourceTable,
    limits: Limits,
    clock: Clock,
    turns: Arc<Turns>,
    log: GuestLog,
    derivations: Arc<Derivations>,
    /// The request that the guest works on.
    exchange: Option<Exchange>,
    space: FileSpace,
    reach: Reach,
}

impl WasiView for HostState {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        WasiCtxView { ctx: &mut self.wasi, table: &mut self.resources }
    }
}

/// Memory and tables of one instance. A refused growth reaches Python as
/// `MemoryError`, which an app may survive.
struct Limits {
    memory: usize,
    memory_used: usize,
    table_elements_used: usize,
    held: Held,
}

/// The tenant holds as much memory as it may, and gets no further instance.
#[derive(Clone, Copy, Debug)]
pub struct TenantFull {
    /// Bytes that the instance needs, as far as it has come.
    pub needs: u64,
}

impl std::fmt::Display for TenantFull {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the tenant holds as much memory as it may")
    }
}

impl std::error::Error for TenantFull {}

impl ResourceLimiter for Limits {
    fn memory_growing(&mut self, current: usize, desired: usize, _: Option<usize>) -> wasmtime::Result<bool> {
        let more = desired.saturating_sub(current);
        let used = self.memory_used.saturating_add(more);
        if used > self.memory {
            return Ok(false);
        }
        if !self.held.grow(more as u64) {
            // A memory begins with its first growth.
            let full = TenantFull { needs: self.held.bytes().saturating_add(more as u64) };
            return if current == 0 { Err(full.into()) } else { Ok(false) };
        }
        self.memory_used = used;
        Ok(true)
    }

    fn table_growing(&mut self, current: usize, desired: usize, _: Option<usize>) -> wasmtime::Result<bool> {
        let more = desired.saturating_sub(current);
        let used = self.table_elements_used.saturating_add(more);
        let allowed = used <= MAX_TABLE_ELEMENTS && self.held.grow(more as u64 * TABLE_ELEMENT);
        if allowed {
            self.table_elements_used = used;
        }
        Ok(allowed)
    }
}

impl request_body::Host for HostState {
    async fn read(&mut self, max: u32) -> Result<Vec<u8>, request_body::ReadError> {
        let Some(exchange) = &mut self.exchange else {
            return Err(request_body::ReadError::Unavailable);
        };
        let _pause = self.clock.pause();
        match exchange.body.read(max.min(MAX_READ) as usize).await {
            Ok(bytes) => Ok(bytes.into()),
            Err(Failure::BodyTooLarge) => Err(request_body::ReadError::TooLarge),
            Err(Failure::ClientGone) => Err(request_body::ReadError::ClientGone),
            Err(_) => Err(request_body::ReadError::Unavailable),
        }
    }
}

impl deadline::Host for HostState {
    async fn time_left(&mut self) -> u64 {
        self.clock.time_left()
    }
}

impl response::Host for HostState {
    async fn start(&mut self, head: Vec<u8>) -> Result<(), response::WriteError> {
        let Some(exchange) = &mut self.exchange else {
            return Err(response::WriteError::Refused);
        };
        let pause = self.clock.pause();
        let started = exchange.start(&head).await;
        if started.is_ok() {
            pause.renew();
        }
        sent(started)
    }

    async fn write(&mut self, chunk: Vec<u8>) -> Result<(), response::WriteError> {
        let Some(exchange) = &mut self.exchange else {
            return Err(response::WriteError::Refused);
        };
        // No piece, no time.
        let is_piece = !chunk.is_empty();
        let pause = self.clock.pause();
        let written = exchange.write(chunk).await;
        if written.is_ok() && is_piece {
            pause.renew();
        }
        sent(written)
    }

    async fn finish(&mut self) -> Result<(), response::WriteError> {
        let Some(exchange) = &mut self.exchange else {
            return Err(response::WriteError::Refused);
        };
        let _pause = self.clock.pause();
        sent(exchange.finish().await)
    }

    async fn send_whole(&mut self, response: Vec<u8>) -> Result<(), response::WriteError> {
        let Some(exchange) = &mut self.exchange else {
            return Err(response::WriteError::Refused);
        };
        let pause = self.clock.pause();
        let whole = exchange.send_whole(response).await;
        if whole.is_ok() {
            pause.renew();
        }
        sent(whole)
    }

    async fn send_file(
        &mut self,
        head: Vec<u8>,
        path: String,
        offset: u64,
        length: u64,
    ) -> Result<bool, response::WriteError> {
        let Some(exchange) = &mut self.exchange else {
            return Err(response::WriteError::Refused);
        };
        let file = self.space.open_for_sending(&path).await;
        let Some(part) = file.and_then(|file| FilePart::new(file, offset, length)) else {
            return Ok(false);
        };
        let _pause = self.clock.pause();
        sent(exchange.send_file(&head, part).await).map(|()| true)
    }

    async fn early_hints(&mut self, fields: Vec<u8>) -> Result<(), response::WriteError> {
        let Some(exchange) = &mut self.exchange else {
            return Err(response::WriteError::Refused);
        };
        let _pause = self.clock.pause();
        sent(exchange.early_hints(&fields).await)
    }
}

/// A step of a response as the guest hears of it. The rule it broke is in the
/// failure that the request ends with.
fn sent(result: Result<(), SendError>) -> Result<(), response::WriteError> {
    result.map_err(|error| match error {
        SendError::ClientGone => response::WriteError::ClientGone,
        SendError::Refused => response::WriteError::Refused,
    })
}

impl wit_key_derivation::Host for HostState {
    async fn pbkdf2_hmac(
        &mut self,
        hash: wit_key_derivation::Digest,
        password: Vec<u8>,
        salt: Vec<u8>,
        iterations: u32,
        length: u32,
    ) -> Result<Vec<u8>, wit_key_derivation::DerivationError> {
        use wit_key_derivation::Digest as Wit;
        let digest = match hash {
            Wit::Md5 => Digest::Md5,
            Wit::Sha1 => Digest::Sha1,
            Wit::Sha224 => Digest::Sha224,
            Wit::Sha256 => Digest::Sha256,
            Wit::Sha384 => Digest::Sha384,
            Wit::Sha512 => Digest::Sha512,
            Wit::Sha3224 => Digest::Sha3_224,
            Wit::Sha3256 => Digest::Sha3_256,
            Wit::Sha3384 => Digest::Sha3_384,
            Wit::Sha3512 => Digest::Sha3_512,
        };
        let derived =
            key_derivation::pbkdf2_hmac(&self.derivations, digest, password, salt, iterations, length).await;
        self.derived(derived)
    }

    async fn scrypt(
        &mut self,
        password: Vec<u8>,
        salt: Vec<u8>,
        n: u32,
        r: u32,
        p: u32,
        length: u32,
    ) -> Result<Vec<u8>, wit_key_derivation::DerivationError> {
        let derived = key_derivation::scrypt(&self.derivations, password, salt, n, r, p, length).await;
        self.derived(derived)
    }
}

impl HostState {
    /// Counts the time that a derivation took as the request's own.
    fn derived(&mut self, derived: Derived) -> Result<Vec<u8>, wit_key_derivation::DerivationError> {
        match derived {
            Ok((key, spent)) => {
                self.clock.spend(spent);
                Ok(key)
            }
            Err(Refusal::Invalid(reason)) => Err(wit_key_derivation::DerivationError::Invalid(reason)),
            Err(Refusal::TooExpensive(reason)) => {
                Err(wit_key_derivation::DerivationError::TooExpensive(reason))
            }
        }
    }
}
