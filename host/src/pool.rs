//! The instances of one app, and who may use them.
//!
//! A [`Lease`] is the right to one instance for one request. Dropping it
//! discards the instance; only the end of a clean call gives it back. So a
//! trap, a timeout, a panic and a client that leaves all take the safe path.

use std::hash::{BuildHasher as _, RandomState};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use wasmtime::PoolConcurrencyLimitError;

use crate::failure::Failure;
use crate::instance::{self, Grants, Instance, Program, Streams, TenantFull};

/// How far instances are shared.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, serde::Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Isolation {
    /// Instances are reused for the app's next requests.
    #[default]
    Tenant,
    /// Each request has a fresh instance.
    Request,
}

/// The rules of a pool.
#[derive(Clone, Debug)]
pub struct PoolSettings {
    /// Requests that can be in work at a time.
    pub instances: usize,
    /// Instances that stay when there is nothing to do.
    pub spare: usize,
    /// Requests that may wait for an instance.
    pub queue: usize,
    /// How long one may wait.
    pub queue_wait: Duration,
    /// How far instances are shared.
    pub isolation: Isolation,
    /// Requests after which an instance is replaced, give or take a tenth.
    pub max_requests: u64,
}

/// The pools of all apps of a server. There is room for so many instances in
/// all; those that rest make room for those that are needed.
#[derive(Default)]
pub struct Pools(Mutex<Vec<Weak<Pool>>>);

impl Pools {
    fn add(&self, pool: &Arc<Pool>) {
        let mut pools = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        pools.retain(|pool| pool.strong_count() > 0);
        pools.push(Arc::downgrade(pool));
    }

    /// Drops the instance that has rested for longest. False if there is none
    /// but those that are meant to stay.
    fn make_room(&self) -> bool {
        let pools = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let pools = pools.iter().filter_map(Weak::upgrade);
        let oldest =
            pools.filter_map(|pool| Some((pool.resting_since()?, pool))).min_by_key(|(since, _)| *since);
        oldest.is_some_and(|(_, pool)| pool.drop_oldest())
    }
}

/// The instances of one app.
pub struct Pool {
    pools: Arc<Pools>,
    /// Another version has taken its place: nothing rests here any more.
    is_retired: AtomicBool,
    program: Program,
    grants: Grants,
    settings: PoolSettings,
    /// One permit per request in work.
    permits: Arc<Semaphore>,
    waiting: AtomicUsize,
    /// Instances at rest. With [`Isolation::Request`] they are unused ones,
    /// prepared so that no request pays for the start of an instance. Each with
    /// the time at which it came to rest; the last one came last.
    idle: Mutex<Vec<(Instance, Instant)>>,
    /// Instances being prepared.
    preparing: AtomicUsize,
}

impl Pool {
    /// A pool without instances.
    pub fn new(pools: &Arc<Pools>, program: Program, grants: Grants, settings: PoolSettings) -> Arc<Pool> {
        let pool = Arc::new(Pool {
            pools: Arc::clone(pools),
            is_retired: AtomicBool::new(false),
            program,
            grants,
            permits: Arc::new(Semaphore::new(settings.instances)),
            settings,
            waiting: AtomicUsize::new(0),
            idle: Mutex::default(),
            preparing: AtomicUsize::new(0),
        });
        pools.add(&pool);
        pool
    }

    /// Makes the first instance: an app that can not start is found before the
    /// first request.
    ///
    /// # Errors
    ///
    /// If the instance can not be made.
    pub async fn warm(self: &Arc<Self>) -> wasmtime::Result<()> {
        let instance = self.start().await?;
        self.rest(instance);
        self.prepare();
        Ok(())
    }

    /// Waits for the right to an instance.
    ///
    /// # Errors
    ///
    /// [`Failure::Overloaded`] if too many wait already, the wait is too long
    /// or the server is full, [`Failure::MemoryExhausted`] if the tenant holds
    /// as much as it may, [`Failure::CannotStart`] if the app does not start.
    pub async fn lease(self: &Arc<Self>) -> Result<Lease, Failure> {
        let permit = match Arc::clone(&self.permits).try_acquire_owned() {
            Ok(permit) => permit,
            Err(_) => self.wait().await?,
        };
        let resting = self.idle().pop().map(|(instance, _)| instance);
        let instance = match resting {
            Some(instance) => instance,
            None => self.start().await.map_err(|error| {
                if error.is::<TenantFull>() {
                    return Failure::MemoryExhausted;
                }
                if error.is::<PoolConcurrencyLimitError>() {
                    tracing::warn!(app = %self.grants.name, "there is no room for an instance: all are at work");
                    return Failure::Overloaded;
                }
                let (reason, _) = instance::explain(&error);
                tracing::error!(app = %self.grants.name, "failed to start an instance: {reason}");
                Failure::CannotStart
            })?,
        };
        self.prepare();
        Ok(Lease { instance: Some(instance), pool: Arc::clone(self), _permit: permit })
    }

    /// Requests in work, and instances at rest.
    pub fn usage(&self) -> (usize, usize) {
        (self.settings.instances - self.permits.available_permits(), self.idle().len())
    }

    /// Drops instances that have rested for as long as `time`, but for those
    /// that are always to be there.
    pub fn trim(&self, time: Duration) {
        let mut idle = self.idle();
        let excess = idle.len().saturating_sub(self.settings.spare);
        let old = idle.iter().take(excess).take_while(|(_, since)| since.elapsed() >= time).count();
        // The oldest come first. Dropped after the lock is released.
        let dropped: Vec<_> = idle.drain(..old).collect();
        drop(idle);
        drop(dropped);
    }

    /// Drops all instances at rest.
    pub fn clear(&self) {
        let dropped = std::mem::take(&mut *self.idle());
        drop(dropped);
    }

    /// Waits until no request is in work.
    pub async fn drained(&self) {
        let all = u32::try_from(self.settings.instances).unwrap_or(u32::MAX);
        // The semaphore is never closed.
        let _ = self.permits.acquire_many(all).await;
    }

    async fn wait(&self) -> Result<OwnedSemaphorePermit, Failure> {
        /// Counts one who waits, until dropped.
        struct Waiting<'a>(&'a AtomicUsize);
        impl Drop for Waiting<'_> {
            fn drop(&mut self) {
                self.0.fetch_sub(1, Ordering::Relaxed);
            }
        }
        let before = self.waiting.fetch_add(1, Ordering::Relaxed);
        let _waiting = Waiting(&self.waiting);
        if before >= self.settings.queue {
            return Err(Failure::Overloaded);
        }
        let permit = Arc::clone(&self.permits).acquire_owned();
        match tokio::time::timeout(self.settings.queue_wait, permit).await {
            Ok(Ok(permit)) => Ok(permit),
            _ => Err(Failure::Overloaded),
        }
    }

    async fn start(&self) -> wasmtime::Result<Instance> {
        loop {
            let started = Instance::new(&self.program, &self.grants, Streams::Log).await;
            match started {
                // Others may be faster and take the room, but only as long as
                // there is some.
                Err(error) if error.is::<PoolConcurrencyLimitError>() && self.pools.make_room() => {}
                started => return started,
            }
        }
    }

    /// Says whether another version has taken this one's place. Then its
    /// instances go as soon as their requests are done.
    pub fn retire(&self, is_retired: bool) {
        self.is_retired.store(is_retired, Ordering::Relaxed);
        if is_retired {
            let dropped = std::mem::take(&mut *self.idle());
            drop(dropped);
        }
    }

    fn resting_since(&self) -> Option<Instant> {
        let idle = self.idle();
        (idle.len() > self.settings.spare).then(|| idle[0].1)
    }

    fn drop_oldest(&self) -> bool {
        let mut idle = self.idle();
        let oldest = (idle.len() > self.settings.spare).then(|| idle.remove(0));
        drop(idle);
        oldest.is_some()
    }

    /// With [`Isolation::Request`], makes an instance for a later request in
    /// the background, as long as there are fewer at rest than requests in
    /// work, or none at all.
    fn prepare(self: &Arc<Self>) {
        if self.settings.isolation != Isolation::Request || self.is_retired.load(Ordering::Relaxed) {
            return;
        }
        let in_work = self.settings.instances - self.permits.available_permits();
        let wanted = (in_work + 1).min(self.settings.instances);
        let ready = self.idle().len() + self.preparing.load(Ordering::Relaxed);
        if ready >= wanted {
            return;
        }
        self.preparing.fetch_add(1, Ordering::Relaxed);
        let pool = Arc::clone(self);
        tokio::spawn(async move {
            let started = pool.start().await;
            pool.preparing.fetch_sub(1, Ordering::Relaxed);
            match started {
                Ok(instance) => pool.rest(instance),
                // A request that needs one will try again and report it.
                Err(error) => {
                    tracing::debug!(app = %pool.grants.name, "failed to prepare an instance: {error:#}")
                }
            }
        });
    }

    fn rest(&self, instance: Instance) {
        let mut idle = self.idle();
        // Looked at under the lock, for `retire` empties the list under it.
        if idle.len() < self.settings.instances && !self.is_retired.load(Ordering::Relaxed) {
            idle.push((instance, Instant::now()));
            return;
        }
        drop(idle);
        self.discard(instance);
    }

    /// Drops an instance, at its app's expense: that takes the host as long as
    /// it has memory to give back.
    fn discard(&self, instance: Instance) {
        let start = Instant::now();
        drop(instance);
        self.grants.share.charge(u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX));
    }

    /// Whether `instance` may serve another request.
    fn may_stay(&self, instance: &Instance) -> bool {
        // Instances that were started together should not end together.
        static SPREAD: std::sync::LazyLock<RandomState> = std::sync::LazyLock::new(RandomState::new);
        let max = self.settings.max_requests;
        let spread = SPREAD.hash_one(std::ptr::from_ref(instance)) % (max / 10 + 1);
        self.settings.isolation == Isolation::Tenant
            && instance.requests() < max.saturating_sub(spread)
            // Linear memory never shrinks. An instance that one request blew
            // up would fail the next ones for lack of memory.
            && instance.memory_used() <= self.grants.memory / 4 * 3
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<(Instance, Instant)>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The right to one instance, for one request.
pub struct Lease {
    /// Gone before the permit is, so that there is room when the next request
    /// gets the permit.
    instance: Option<Instance>,
    pool: Arc<Pool>,
    _permit: OwnedSemaphorePermit,
}

impl Lease {
    /// The instance. None only in the middle of [`Lease::give_back`].
    pub fn instance(&mut self) -> Option<&mut Instance> {
        self.instance.as_mut()
    }

    /// The request ended cleanly: the instance may serve another one.
    pub fn give_back(mut self) {
        if let Some(instance) = self.instance.take_if(|instance| self.pool.may_stay(instance)) {
            self.pool.rest(instance);
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(instance) = self.instance.take() {
            self.pool.discard(instance);
        }
    }
}
