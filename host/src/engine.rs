//! The wasmtime engine: what code may do, how many instances fit, and the
//! clock that stops a spinning guest.

use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use wasmtime::{
    Config, Enabled, Engine, InstanceAllocationStrategy, OptLevel, PoolingAllocationConfig, Result,
};

use crate::scheduler;

/// Time between two ticks of the epoch, at which a guest is looked at: often
/// while some compute for long, since others wait for them.
const EPOCH_TICK: Duration = Duration::from_millis(5);
const SHORT_TICK: Duration = Duration::from_millis(1);

/// Stack for WebAssembly frames. CPython's own guard raises `RecursionError`
/// before the stack ends from 24 MiB on; with less, deep recursion in C code
/// (`repr`, `json`) traps. Reserved, not resident.
const WASM_STACK: usize = 24 << 20;
/// The fiber's stack holds the frames above and those of host functions.
const FIBER_STACK: usize = WASM_STACK + (2 << 20);

/// Bytes a single call between guest and host may carry in lists and strings.
/// A guard against a guest that passes a huge list: wasmtime copies it into
/// host memory before we see it, and does not yield while it does. Bodies
/// travel in chunks of a mebibyte.
pub const HOSTCALL_FUEL: usize = 4 << 20;

/// Handles to host resources (files, streams, pollables) that one instance may
/// hold at a time.
pub const MAX_RESOURCES: usize = 1024;

/// Elements of one table. CPython's function table has about 11,000.
const TABLE_ELEMENTS: usize = 40_000;

/// What one component may have.
const CORE_INSTANCES: u32 = 64;
const MEMORIES: u32 = 2;
const TABLES: u32 = 24;

/// The settings that machine code depends on. The process that compiles and
/// the one that runs must agree on them; `Engine::precompile_compatibility_hash`
/// covers them and names the cache entry.
fn code_config() -> Config {
    let mut config = Config::new();
    config.wasm_component_model(true);
    config.epoch_interruption(true);
    config.cranelift_opt_level(OptLevel::Speed);
    config.max_wasm_stack(WASM_STACK);
    config.async_stack_size(FIBER_STACK);
    // Off, since no guest of ours needs them: each is code that an attacker
    // could reach. 64-bit memories had RUSTSEC-2026-0096.
    config.wasm_memory64(false);
    config.wasm_relaxed_simd(false);
    config.wasm_tail_call(false);
    config.wasm_custom_page_sizes(false);
    config.wasm_wide_arithmetic(false);
    config
}

/// An engine that compiles, for `wsgi-wasm compile`.
///
/// # Errors
///
/// If the machine can not run wasmtime.
pub fn compiler() -> Result<Engine> {
    Engine::new(&code_config())
}

/// An engine that runs up to `instances` instances at a time, from a pool of
/// preallocated slots. Their memory is limited by each store, not here.
///
/// # Errors
///
/// If the machine can not reserve the address space.
pub fn runner(instances: u32) -> Result<Engine> {
    let mut pool = PoolingAllocationConfig::new();
    // One component from componentize-py is 14 core modules with one memory
    // and one large table; the rest is room for other tools' output. There is
    // as much in all as all instances may have: else some large ones would
    // leave no room for others.
    pool.total_component_instances(instances)
        .total_core_instances(instances.saturating_mul(CORE_INSTANCES))
        .total_memories(instances.saturating_mul(MEMORIES))
        .total_tables(instances.saturating_mul(TABLES))
        .total_stacks(instances)
        .max_core_instances_per_component(CORE_INSTANCES)
        .max_memories_per_component(MEMORIES)
        .max_memories_per_module(MEMORIES)
        .max_tables_per_component(TABLES)
        .max_tables_per_module(8)
        .max_component_instance_size(8 << 20)
        .max_core_instance_size(4 << 20)
        .table_elements(TABLE_ELEMENTS)
        // A slot that is used again is reset by copying back the pages that
        // the last guest changed, found by the kernel's PAGEMAP_SCAN where it
        // has that (Linux 6.7), instead of dropping and faulting in every page. Only so
        // many: to copy tens of megabytes takes milliseconds in which nobody gives way,
        // and each slot would keep them.
        .pagemap_scan(Enabled::Auto)
        .linear_memory_keep_resident(4 << 20)
        .table_keep_resident(1 << 20)
        .async_stack_keep_resident(64 << 10);
    let mut config = code_config();
    // Else a stack stays as large as the deepest recursion that was ever on it.
    config.async_stack_zeroing(true);
    config.allocation_strategy(InstanceAllocationStrategy::Pooling(pool));
    Engine::new(&config)
}

/// The threads that advance the epoch of an engine. A timer for each request
/// instead costs a hundred times more (wasmtime issue 11814).
pub struct EpochTicker {
    /// Each with what stops it when it is dropped.
    threads: Vec<(mpsc::Sender<()>, JoinHandle<()>)>,
}

impl EpochTicker {
    /// Starts so many threads; if more than one, each on a processor of its own as far as
    /// there are. Where the kernel has just switched to a thread, it may let nobody interrupt
    /// it for milliseconds, and so not the one that ticks; that both of two wait is rare.
    ///
    /// They tick more often while `is_computing`, and end when the ticker is dropped or no
    /// one else holds the engine.
    ///
    /// # Errors
    ///
    /// If a thread can not be started.
    pub fn start(
        engine: &Engine,
        threads: usize,
        is_computing: impl Fn() -> bool + Clone + Send + 'static,
    ) -> std::io::Result<EpochTicker> {
        let mut ticker = EpochTicker { threads: Vec::new() };
        for index in 0..threads {
            let (engine, is_computing) = (engine.weak(), is_computing.clone());
            let (stop, stopped) = mpsc::channel();
            let thread = std::thread::Builder::new().name("epoch".into()).spawn(move || {
                scheduler::be_prompt();
                if threads > 1 {
                    scheduler::stay_on(index);
                }
                let tick = || if is_computing() { SHORT_TICK } else { EPOCH_TICK };
                while stopped.recv_timeout(tick()) == Err(mpsc::RecvTimeoutError::Timeout) {
                    match engine.upgrade() {
                        Some(engine) => engine.increment_epoch(),
                        None => return,
                    }
                }
            })?;
            ticker.threads.push((stop, thread));
        }
        Ok(ticker)
    }
}

impl Drop for EpochTicker {
    fn drop(&mut self) {
        for (stop, thread) in self.threads.drain(..) {
            drop(stop);
            // It can not have panicked, and there is nothing to do if it had.
            let _ = thread.join();
        }
    }
}
