//! The instances of one app, and who may use them.
//!
//! A [`Lease`] is the right to one instance for one request. Dropping it
//! discards the instance; only the end of a clean call gives it back. So a
//! trap, a timeout, a panic and a client that leaves all take the safe path.

use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use wasmtime::PoolConcurrencyLimitError;

use crate::failure::Failure;
use crate::footprint::{self, Together};
use crate::instance::{self, Grants, Instance, Program, Streams, TenantFull};

/// Processor time that the start of an instance takes at most on a thread where others'
/// requests wait. Most take a twentieth of it; those of an app that writes to much memory,
/// longer.
const LONG_START: Duration = Duration::from_millis(1);

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
/// all; those that rest make room for those that are needed. Some more room is
/// in reserve for pools that have no instance: whatever the others do, an app
/// can answer one request at a time.
pub struct Pools {
    all: Mutex<Vec<Weak<Pool>>>,
    room: Arc<Semaphore>,
    reserve: Arc<Semaphore>,
    /// Requests that wait for room.
    wanted: AtomicUsize,
    memory: Arc<Together>,
}

impl Pools {
    /// Pools that have `room` for instances together, and some more in
    /// `reserve`, and `memory` in bytes.
    pub fn new(room: u32, reserve: u32, memory: u64) -> Arc<Pools> {
        let semaphore = |permits: u32| Arc::new(Semaphore::new(permits as usize));
        let pools = Arc::new(Pools {
            all: Mutex::default(),
            room: semaphore(room),
            reserve: semaphore(reserve),
            wanted: AtomicUsize::new(0),
            memory: Together::new(memory),
        });
        let relief = Arc::downgrade(&pools);
        pools.memory.relieve_by(move || relief.upgrade().is_some_and(|pools| pools.make_room()));
        pools
    }

    /// The memory that all have together.
    pub fn memory(&self) -> &Arc<Together> {
        &self.memory
    }

    fn add(&self, pool: &Arc<Pool>) {
        let mut pools = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        pools.retain(|pool| pool.strong_count() > 0);
        pools.push(Arc::downgrade(pool));
    }

    /// Drops the instance that has rested for longest. False if there is none
    /// but those that are meant to stay.
    fn make_room(&self) -> bool {
        let pools = self.all.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let pools = pools.iter().filter_map(Weak::upgrade);
        let oldest =
            pools.filter_map(|pool| Some((pool.resting_since()?, pool))).min_by_key(|(since, _)| *since);
        oldest.is_some_and(|(_, pool)| pool.drop_oldest())
    }

    /// Room for an instance of the pool with this `occupancy`, if there is some.
    fn room_for(&self, occupancy: &Arc<Occupancy>) -> Option<Room> {
        loop {
            if let Ok(permit) = Arc::clone(&self.room).try_acquire_owned() {
                return Some(Room::new(permit, occupancy));
            }
            // Others may be faster and take the room, but only as long as
            // there is some.
            if !self.make_room() {
                break;
            }
        }
        // Two that come at the same time can both find no instance here. Then
        // the pool has one more of the reserve, for a while.
        let permit = (occupancy.instances.load(Ordering::Relaxed) == 0)
            .then(|| Arc::clone(&self.reserve).try_acquire_owned().ok())
            .flatten()?;
        Some(Room::new(permit, occupancy))
    }
}

/// How many instances a pool has, at rest or at work.
#[derive(Default)]
struct Occupancy {
    instances: AtomicUsize,
    /// Told when one has done its work and is gone or at rest.
    freed: Notify,
}

/// The room that an instance takes, until dropped.
struct Room {
    /// Gone after the count is lower, so that whoever finds none here finds the reserve.
    permit: Option<OwnedSemaphorePermit>,
    occupancy: Arc<Occupancy>,
}

impl Room {
    fn new(permit: OwnedSemaphorePermit, occupancy: &Arc<Occupancy>) -> Room {
        occupancy.instances.fetch_add(1, Ordering::Relaxed);
        Room { permit: Some(permit), occupancy: Arc::clone(occupancy) }
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.occupancy.instances.fetch_sub(1, Ordering::Relaxed);
        drop(self.permit.take());
    }
}

/// An instance in its room.
struct Live {
    instance: Instance,
    /// Requests after which it is replaced.
    max_requests: u64,
    // Last, so that the instance is gone when there is room again.
    _room: Room,
}

/// There is no room for an instance, or no memory: all are at work.
#[derive(Clone, Copy, Debug)]
enum ServerFull {
    /// No place among the instances.
    Room,
    /// The engine, though it should have had a place.
    Engine,
    /// So many bytes of memory are needed, or more.
    Memory(u64),
}

impl std::fmt::Display for ServerFull {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("there is no room for an instance: all are at work")
    }
}

impl std::error::Error for ServerFull {}

/// What there is none of, if that is why there is no instance.
fn full(error: &wasmtime::Error) -> Option<ServerFull> {
    let engine = error.is::<PoolConcurrencyLimitError>().then_some(ServerFull::Engine);
    error.downcast_ref::<ServerFull>().copied().or(engine)
}

/// Counts one who waits, until dropped.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn new(count: &'a AtomicUsize) -> Waiting<'a> {
        count.fetch_add(1, Ordering::Relaxed);
        Waiting(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A request's place in the line for memory.
struct InLine<'a> {
    place: footprint::Place,
    pool: &'a Pool,
}

impl Drop for InLine<'_> {
    fn drop(&mut self) {
        // It may be that another one here has to line up now.
        self.pool.is_in_line.swap(false, Ordering::AcqRel);
        self.pool.occupancy.freed.notify_one();
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
    /// Told when no request is in work any more.
    done: Notify,
    waiting: AtomicUsize,
    /// Whether one of those who wait is in the line for memory.
    is_in_line: AtomicBool,
    occupancy: Arc<Occupancy>,
    /// Instances at rest. With [`Isolation::Request`] they are unused ones,
    /// prepared so that no request pays for the start of an instance. Each with
    /// the time at which it came to rest; the last one came last.
    idle: Mutex<Vec<(Live, Instant)>>,
    /// Instances being prepared.
    preparing: AtomicUsize,
    /// Whether it took long to prepare the last one.
    start_is_long: AtomicBool,
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
            done: Notify::new(),
            waiting: AtomicUsize::new(0),
            is_in_line: AtomicBool::new(false),
            occupancy: Arc::default(),
            idle: Mutex::default(),
            preparing: AtomicUsize::new(0),
            start_is_long: AtomicBool::new(false),
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
        let live = self.start_when_there_is_room(self.end_of_wait()).await?;
        self.rest(live);
        self.prepare();
        Ok(())
    }

    /// Waits for the right to an instance.
    ///
    /// # Errors
    ///
    /// [`Failure::Overloaded`] if too many wait already or the wait is too
    /// long, [`Failure::MemoryExhausted`] if the tenant holds as much as it
    /// may, [`Failure::CannotStart`] if the app does not start.
    pub async fn lease(self: &Arc<Self>) -> Result<Lease, Failure> {
        let end = self.end_of_wait();
        let permit = match Arc::clone(&self.permits).try_acquire_owned() {
            Ok(permit) => permit,
            Err(_) => {
                let _waiting = self.queue()?;
                let permit = Arc::clone(&self.permits).acquire_owned();
                match tokio::time::timeout_at(end, permit).await {
                    Ok(Ok(permit)) => permit,
                    _ => return Err(Failure::Overloaded),
                }
            }
        };
        let place = Place { permit: Some(permit), pool: Arc::clone(self) };
        let resting = self.idle().pop().map(|(live, _)| live);
        let live = match resting {
            Some(live) => live,
            None => {
                let started = self.start_when_there_is_room(end).await;
                started.map_err(|error| self.no_instance(&error))?
            }
        };
        self.prepare();
        Ok(Lease { live: Some(live), place })
    }

    /// When one who begins to wait for an instance now has waited for too long.
    fn end_of_wait(&self) -> tokio::time::Instant {
        tokio::time::Instant::now() + self.settings.queue_wait
    }

    /// Makes an instance, if need be when others' have gone.
    async fn start_when_there_is_room(&self, end: tokio::time::Instant) -> wasmtime::Result<Live> {
        match self.start().await {
            Err(error) if full(&error).is_some() => self.wait_for_room(end).await,
            started => started,
        }
    }

    /// Takes a place among those who wait.
    fn queue(&self) -> Result<Waiting<'_>, Failure> {
        let waiting = Waiting::new(&self.waiting);
        if self.waiting.load(Ordering::Relaxed) > self.settings.queue {
            return Err(Failure::Overloaded);
        }
        Ok(waiting)
    }

    /// Waits until an instance of this pool comes to rest, or there is room and
    /// memory for one more.
    async fn wait_for_room(&self, end: tokio::time::Instant) -> wasmtime::Result<Live> {
        let Ok(_waiting) = self.queue() else { return Err(ServerFull::Room.into()) };
        let _wanted = Waiting::new(&self.pools.wanted);
        let (mut in_line, mut least) = (None, 0);
        loop {
            let mut freed = pin!(self.occupancy.freed.notified());
            freed.as_mut().enable();
            let resting = self.idle().pop().map(|(live, _)| live);
            if let Some(live) = resting {
                return Ok(live);
            }
            let mut reason = match self.start().await {
                Err(error) => full(&error).ok_or(error)?,
                started => return started,
            };
            if let ServerFull::Memory(bytes) = &mut reason {
                *bytes = least.max(*bytes);
                in_line = in_line.or_else(|| self.line_up());
            } else {
                in_line = None;
            }
            let memory = async {
                match (&in_line, reason) {
                    (Some(line), ServerFull::Memory(bytes)) => {
                        let is_first = self.occupancy.instances.load(Ordering::Relaxed) == 0;
                        line.place.turn(bytes, is_first).await;
                        // If that does not do, it is not asked for again.
                        least = bytes.saturating_add(footprint::INSTANCE);
                    }
                    // Another one of this pool is in line. Who leaves it says so.
                    _ => std::future::pending().await,
                }
            };
            tokio::select! {
                () = freed => {}
                () = memory => {}
                permit = Arc::clone(&self.pools.room).acquire_owned(), if matches!(reason, ServerFull::Room) => {
                    // The semaphore is never closed.
                    let room = Room::new(permit.map_err(|_| reason)?, &self.occupancy);
                    match self.start_in(room).await {
                        Err(error) if full(&error).is_some() => {}
                        started => return started,
                    }
                }
                () = tokio::time::sleep_until(end) => return Err(reason.into()),
            }
        }
    }

    /// Lines up for memory, if no other request of this pool has. Few requests
    /// are in line, then, and nobody's many are before another's one.
    fn line_up(&self) -> Option<InLine<'_>> {
        // The one who was in line says that it is over to those who wait for
        // `freed` by then, as whoever comes here does.
        let is_taken = self.is_in_line.swap(true, Ordering::AcqRel);
        (!is_taken).then(|| InLine { place: self.grants.footprint.line_up(), pool: self })
    }

    /// Logs why there is no instance for a request, and says what that means
    /// for it.
    fn no_instance(&self, error: &wasmtime::Error) -> Failure {
        if error.is::<TenantFull>() {
            return Failure::MemoryExhausted;
        }
        let app = &self.grants.name;
        if let Some(full) = full(error) {
            tracing::warn!(%app, "{full}");
            return Failure::Overloaded;
        }
        let (reason, _) = instance::explain(error);
        tracing::error!(%app, "failed to start an instance: {reason}");
        Failure::CannotStart
    }

    /// Requests in work, and instances at rest.
    pub fn usage(&self) -> (usize, usize) {
        (self.in_work(), self.idle().len())
    }

    fn in_work(&self) -> usize {
        self.settings.instances - self.permits.available_permits()
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

    /// Waits until no request is in work. Takes no permit: whoever comes
    /// meanwhile is served.
    pub async fn drained(&self) {
        loop {
            let mut done = pin!(self.done.notified());
            done.as_mut().enable();
            if self.in_work() == 0 {
                return;
            }
            done.await;
        }
    }

    async fn start(&self) -> wasmtime::Result<Live> {
        let room = self.pools.room_for(&self.occupancy).ok_or(ServerFull::Room)?;
        self.start_in(room).await
    }

    async fn start_in(&self, room: Room) -> wasmtime::Result<Live> {
        // Those without an instance go first. This one's room is counted already.
        if self.pools.memory.is_owed() && self.occupancy.instances.load(Ordering::Relaxed) > 1 {
            return Err(ServerFull::Memory(0).into());
        }
        let instance = match Instance::new(&self.program, &self.grants, Streams::Log).await {
            Err(error) => {
                return Err(match error.downcast_ref::<TenantFull>() {
                    // It has not had its own fill: the others have.
                    Some(full) if self.grants.footprint.has_room(full.needs) => {
                        ServerFull::Memory(full.needs).into()
                    }
                    _ => error,
                });
            }
            Ok(instance) => instance,
        };
        // Instances that were started together should not end together.
        let max = self.settings.max_requests;
        let spread = RandomState::new().build_hasher().finish() % (max / 10 + 1);
        Ok(Live { instance, max_requests: max - spread, _room: room })
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

    /// With [`Isolation::Request`], makes an instance for a later request, as long as
    /// there are fewer at rest than requests in work, or none at all.
    fn prepare(self: &Arc<Self>) {
        if self.settings.isolation != Isolation::Request || self.is_retired.load(Ordering::Relaxed) {
            return;
        }
        // Room for a request that is there goes before.
        if self.pools.wanted.load(Ordering::Relaxed) > 0 {
            return;
        }
        let wanted = (self.in_work() + 1).min(self.settings.instances);
        let ready = self.idle().len() + self.preparing.load(Ordering::Relaxed);
        if ready >= wanted {
            return;
        }
        self.preparing.fetch_add(1, Ordering::Relaxed);
        let pool = Arc::clone(self);
        let preparation = async move {
            let started = pool.start().await;
            pool.preparing.fetch_sub(1, Ordering::Relaxed);
            match started {
                Ok(live) => {
                    let is_long = live.instance.start_time() >= LONG_START;
                    pool.start_is_long.store(is_long, Ordering::Relaxed);
                    pool.rest(live);
                }
                // A request that needs one will try again and report it.
                Err(error) => {
                    tracing::debug!(app = %pool.grants.name, "failed to prepare an instance: {error:#}")
                }
            }
        };
        // It is not what a request waits for. But it is soon done, and then cheaper here: with
        // memory that was just in use, and without another thread that has to wake up.
        if self.start_is_long.load(Ordering::Relaxed) || self.grants.share.is_ahead() {
            self.grants.share.background().spawn(preparation);
        } else {
            tokio::spawn(preparation);
        }
    }

    fn rest(&self, live: Live) {
        let mut idle = self.idle();
        // Others wait for room, and nobody here for an instance; or one who has
        // none waits for memory, and here are several.
        let is_needed_elsewhere = self.pools.wanted.load(Ordering::Relaxed) > 0
            && ((self.waiting.load(Ordering::Relaxed) == 0 && idle.len() >= self.settings.spare)
                || (self.pools.memory.is_owed()
                    && self.occupancy.instances.load(Ordering::Relaxed) > self.settings.spare.max(1)));
        // Looked at under the lock, for `retire` empties the list under it.
        let may_rest = idle.len() < self.settings.instances && !self.is_retired.load(Ordering::Relaxed);
        if may_rest && !is_needed_elsewhere {
            idle.push((live, Instant::now()));
            drop(idle);
            self.occupancy.freed.notify_one();
            return;
        }
        drop(idle);
        self.discard(live);
    }

    /// Drops an instance, at its app's expense: that takes the host as long as
    /// it has memory to give back.
    fn discard(&self, live: Live) {
        self.grants.share.charged(|| drop(live));
        self.occupancy.freed.notify_one();
    }

    /// Whether an instance may serve another request.
    fn may_stay(&self, live: &Live) -> bool {
        self.settings.isolation == Isolation::Tenant
            && live.instance.requests() < live.max_requests
            // Linear memory never shrinks. An instance that one request blew
            // up would fail the next ones for lack of memory.
            && live.instance.memory_used() <= self.grants.memory / 4 * 3
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<(Live, Instant)>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The right to have a request in work.
struct Place {
    permit: Option<OwnedSemaphorePermit>,
    pool: Arc<Pool>,
}

impl Drop for Place {
    fn drop(&mut self) {
        drop(self.permit.take());
        if self.pool.in_work() == 0 {
            self.pool.done.notify_waiters();
        }
    }
}

/// The right to one instance, for one request.
pub struct Lease {
    /// Gone before the place is, so that there is room when the next request
    /// gets the place.
    live: Option<Live>,
    place: Place,
}

impl Lease {
    /// The instance. None only in the middle of [`Lease::give_back`].
    pub fn instance(&mut self) -> Option<&mut Instance> {
        self.live.as_mut().map(|live| &mut live.instance)
    }

    /// The request ended cleanly: the instance may serve another one.
    pub fn give_back(mut self) {
        if let Some(live) = self.live.take_if(|live| self.place.pool.may_stay(live)) {
            self.place.pool.rest(live);
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(live) = self.live.take() {
            self.place.pool.discard(live);
        }
    }
}
