//! Who may compute when all processors are busy.
//!
//! Each tenant has a virtual time: the processor time that it had, divided by
//! its weight. What it would be if all that are active had shared equally is the
//! virtual time of the scheduler (that of generalized processor sharing). A
//! tenant that had more than that lately, while others want to compute, is ahead.
//!
//! There are two kinds of threads. On those of the runtime a request starts at
//! once; they are for requests that are soon done. A request that computes for
//! longer, and each one of a tenant that is ahead, goes on in the background,
//! on threads to which the kernel gives less, and which let others go first at
//! each tick of the epoch. There it needs a [`Slot`] for each slice of time.
//! There are as many slots as processors, and when more want one than there
//! are, the tenant with the least virtual time goes first. So a tenant's share
//! does not depend on how many requests it has open. What a tenant that is ahead
//! does with files, which may wait for a disk, has further threads that get less still.

use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use rustix::process::{getpriority_process, setpriority_process};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use thread_priority::{
    DeadlineFlags, NormalThreadSchedulePolicy, RealtimeThreadSchedulePolicy, ThreadPriority,
    ThreadPriorityValue, ThreadSchedulePolicy, set_thread_priority_and_policy, thread_native_id,
};
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::oneshot;

use crate::clock::{Turnstile, thread_time};

/// Virtual time for a microsecond of a tenant with weight 1.
const SCALE: u64 = 1000;

/// Virtual time that a tenant may have more than its part and not be ahead:
/// some requests' worth, so that it is not by chance.
const HEAD_START: u64 = 5_000 * SCALE;

/// Virtual time that a tenant may have more or less than its part, and owe it
/// or be owed it. One whose requests can not use its part, or that could have
/// others' parts since they did not, has saved nothing up and owes nothing.
const CREDIT: u64 = 200_000 * SCALE;

/// The same for who is ahead: nothing is owed, and little is remembered. A tenant
/// may have saved up for a burst of requests; those of others come between all the same.
const LEAD: u64 = 20_000 * SCALE;

/// How much slower a tenant without budget goes.
const PENALTY: u64 = 10;

/// Microseconds for which a tenant is active after it was last seen.
const LINGER: u64 = 10_000_000;

/// Microseconds after which is looked at who is still active, and how busy the
/// processors are.
const SURVEY: u64 = 5_000;

/// One part in so many of the processors' time is what guests use at least when the
/// processors are busy: the host's own work takes as much again.
const BUSY: u64 = 3;

/// Processor time for which a slot is good, and after which a request goes on in
/// the background. Shorter slices cost more switches than they gain in latency.
const SLICE: u64 = 5_000;

/// What the threads in the background are nicer by: one of the foreground has six
/// times as much. It counts among the threads of a control group or session, so not
/// against other services.
const NICENESS: i32 = 8;
/// The same for those that work on the files of a tenant that is ahead. It has sixteen of
/// them, each of which is woken at every step: as nice as its guests, they have together as
/// much as a thread of the foreground, while that answers another tenant.
const NICENESS_ON_FILES: i32 = 19;
/// Less than both, on the scale from 0 to 99 of the library that sets policies.
const SOMEWHAT_NICE: u8 = 40;

/// The shortest slice of time that the kernel gives (`kernel/sched/syscalls.c`, `__setparam_fair`).
const SHORTEST_SLICE: Duration = Duration::from_micros(100);

/// The threads on which requests begin, one for each processor. Each calls `parks` when it
/// has nothing to do: see [`Scheduler::is_computing`].
///
/// # Errors
///
/// If they can not be started.
pub fn foreground(parks: impl Fn() + Send + Sync + 'static) -> std::io::Result<Runtime> {
    // Not more than can run, so that they need not wait for each other.
    let threads = processors().max(2);
    let pins = Pins::new(threads);
    Builder::new_multi_thread()
        .worker_threads(threads)
        // Polls between two looks at who has sent something: few, since a flood
        // of others' requests makes each of them long.
        .event_interval(8)
        .on_thread_start(move || {
            be_prompt();
            pins.iter().for_each(Pins::started);
        })
        .on_thread_park(parks)
        .enable_all()
        .build()
}

/// Keeps each of the threads on a processor of its own. Else the kernel wakes them
/// where their wakers are, two on one processor, and one waits for the other's slice
/// to end; while the other processor has guests of the background, which would give
/// way at once.
struct Pins {
    processors: Vec<usize>,
    all: CpuSet,
    started: AtomicUsize,
}

impl Pins {
    /// None if we have not all of each processor: then others' threads would be on
    /// the same ones.
    fn new(threads: usize) -> Option<Pins> {
        let all = sched_getaffinity(None).ok()?;
        let processors: Vec<_> = members(&all).collect();
        (processors.len() == threads).then(|| Pins { processors, all, started: AtomicUsize::new(0) })
    }

    /// Called by each thread of the runtime: first by those that are meant, then by
    /// those that wait for files and the like, and would inherit the place of who
    /// started them.
    fn started(&self) {
        let own = self.processors.get(self.started.fetch_add(1, Ordering::Relaxed));
        stay_within(&own.map_or(self.all, |processor| only(*processor)));
    }
}

/// Has this thread run when it is woken, even where the kernel has just switched to
/// another one: it asks for the shortest slices there are, which go before longer ones
/// (Linux 6.12, EEVDF, `PREEMPT_SHORT`). Its part of a processor is what it was.
pub fn be_prompt() {
    // That is `sched_setattr(2)`, which the library has for `SCHED_DEADLINE` only, but with
    // any flags: `SCHED_FLAG_KEEP_POLICY` is 8. An older kernel refuses it or has no slices.
    let slice = ThreadPriority::Deadline {
        runtime: SHORTEST_SLICE,
        deadline: Duration::ZERO,
        period: Duration::ZERO,
        flags: DeadlineFlags::from_bits_retain(8),
    };
    let policy = ThreadSchedulePolicy::Realtime(RealtimeThreadSchedulePolicy::Deadline);
    let this_thread = 0;
    // It sets the niceness to 0, and less than that can not be had again without privileges.
    let niceness = getpriority_process(None).unwrap_or(0);
    if niceness >= 0 {
        let _ = set_thread_priority_and_policy(this_thread, slice, policy);
        let _ = setpriority_process(None, niceness);
    }
}

/// Keeps this thread on the one of our processors with this index, if there is one.
pub fn stay_on(index: usize) {
    if let Some(processor) = sched_getaffinity(None).ok().and_then(|all| members(&all).nth(index)) {
        stay_within(&only(processor));
    }
}

fn members(set: &CpuSet) -> impl Iterator<Item = usize> {
    (0..CpuSet::MAX_CPU).filter(|processor| set.is_set(*processor))
}

fn only(processor: usize) -> CpuSet {
    let mut set = CpuSet::new();
    set.set(processor);
    set
}

fn stay_within(processors: &CpuSet) {
    // Where it is refused, the kernel chooses.
    let _ = sched_setaffinity(None, processors);
}

/// The threads that give way to those on which requests begin.
#[derive(Debug)]
pub struct Background {
    guests: Runtime,
    /// Has no thread but those that may wait for a disk.
    files: Runtime,
}

impl Background {
    /// Starts those that are meant for guests that compute for long; the others are started
    /// when there is work on files.
    ///
    /// # Errors
    ///
    /// If they can not be started.
    pub fn start() -> std::io::Result<Background> {
        let guests = Builder::new_multi_thread()
            // More than slots: one that waited for its client or a file finds a thread.
            .worker_threads(2 * processors())
            .thread_name("background")
            .on_thread_start(be_nicer(NICENESS))
            .enable_all()
            .build()?;
        let files = Builder::new_current_thread()
            .thread_name("files")
            .on_thread_start(be_nicer(NICENESS_ON_FILES))
            .build()?;
        Ok(Background { guests, files })
    }

    /// Ends them, whatever they do, after `timeout` for each kind at the latest.
    pub fn shutdown(self, timeout: Duration) {
        self.guests.shutdown_timeout(timeout);
        self.files.shutdown_timeout(timeout);
    }
}

/// Makes the thread in which it is called nicer by so much than this one.
fn be_nicer(by: i32) -> impl Fn() + Send + Sync + 'static {
    let niceness = getpriority_process(None).unwrap_or(0) + by;
    move || {
        // They do not interrupt others when they wake up (sched(7)). Where any of
        // this is refused, they are like the others.
        let batch = ThreadSchedulePolicy::Normal(NormalThreadSchedulePolicy::Batch);
        let _ = ThreadPriorityValue::try_from(SOMEWHAT_NICE).map(|nice| {
            let nice = ThreadPriority::Crossplatform(nice);
            set_thread_priority_and_policy(thread_native_id(), nice, batch)
        });
        let _ = setpriority_process(None, niceness);
    }
}

/// A tenant's part in the use of the processors.
#[derive(Debug)]
pub struct Share {
    scheduler: Arc<Scheduler>,
    weight: u64,
    virtual_time: AtomicU64,
    /// The same, with what was before the last milliseconds forgotten.
    recent_time: AtomicU64,
    /// Processor time in microseconds, ever.
    used: AtomicU64,
    /// When it last wanted to compute, in the scheduler's microseconds.
    seen_at: AtomicU64,
    /// Whether it is among the scheduler's active ones. Changed under the lock.
    is_active: AtomicBool,
    budget: Option<Budget>,
}

/// Processor time that a tenant may use in each minute.
#[derive(Debug)]
struct Budget {
    /// Microseconds for each minute.
    per_minute: i64,
    base: Instant,
    /// Microseconds that are left; below zero if more was used.
    left: AtomicI64,
    /// Microseconds after `base` at which `left` was last filled up.
    filled_at: AtomicU64,
}

impl Share {
    /// A share with `weight` relative to others, and a budget for each minute.
    pub fn new(scheduler: &Arc<Scheduler>, weight: u32, cpu_per_minute: Option<Duration>) -> Arc<Share> {
        let budget = cpu_per_minute.map(|time| {
            let per_minute = i64::try_from(time.as_micros()).unwrap_or(i64::MAX);
            Budget {
                per_minute,
                base: Instant::now(),
                left: AtomicI64::new(per_minute),
                filled_at: AtomicU64::new(0),
            }
        });
        Arc::new(Share {
            scheduler: Arc::clone(scheduler),
            weight: u64::from(weight.max(1)),
            virtual_time: AtomicU64::new(0),
            recent_time: AtomicU64::new(0),
            used: AtomicU64::new(0),
            seen_at: AtomicU64::new(0),
            is_active: AtomicBool::new(false),
            budget,
        })
    }

    /// Notes that `microseconds` of processor time were used.
    pub fn charge(&self, microseconds: u64) {
        self.used.fetch_add(microseconds, Ordering::Relaxed);
        let mut scaled = microseconds.saturating_mul(SCALE);
        if let Some(budget) = &self.budget {
            budget.fill();
            let spent = i64::try_from(microseconds).unwrap_or(i64::MAX);
            let left = budget.left.fetch_sub(spent, Ordering::Relaxed) - spent;
            if left < 0 {
                scaled = scaled.saturating_mul(PENALTY);
            }
        }
        let scheduler = &*self.scheduler;
        let active_weight = scheduler.active_weight.load(Ordering::Relaxed).max(self.weight);
        let part = scaled / active_weight;
        let now = scheduler.virtual_time.fetch_add(part, Ordering::Relaxed) + part;
        let own = scaled / self.weight;
        for (time, most) in [(&self.virtual_time, now + CREDIT), (&self.recent_time, now + LEAD)] {
            if time.fetch_add(own, Ordering::Relaxed) + own > most {
                time.fetch_min(most, Ordering::Relaxed);
            }
        }
        scheduler.survey(scheduler.now(), microseconds);
    }

    /// Does `work` on this thread and charges its processor time. Returns what
    /// came of it, and that time.
    pub fn charged<T>(&self, work: impl FnOnce() -> T) -> (T, Duration) {
        let start = thread_time();
        let done = work();
        let spent = thread_time().saturating_sub(start);
        self.charge(spent);
        (done, Duration::from_micros(spent))
    }

    /// Whether the tenant has had more than its part lately, while others want to compute.
    pub fn is_ahead(self: &Arc<Self>) -> bool {
        self.see();
        let scheduler = &*self.scheduler;
        scheduler.active_weight.load(Ordering::Relaxed) > self.weight
            && (scheduler.is_busy.load(Ordering::Relaxed) || scheduler.is_contended.load(Ordering::Relaxed))
            && self.recent_time.load(Ordering::Relaxed)
                > scheduler.virtual_time.load(Ordering::Relaxed).saturating_add(HEAD_START)
    }

    /// Gets in line for a slot. At once, and not when the result is first
    /// polled: a request that has a slot and wants the next one must be in line
    /// when it gives its own up, or it would be passed over by those that are.
    pub fn turn(self: &Arc<Self>) -> Turn {
        self.see();
        let mut state = self.scheduler.lock();
        if state.free > 0 {
            state.free -= 1;
            self.scheduler.is_computing.store(true, Ordering::Relaxed);
            return Turn(Place::Free(Slot(Some(Arc::clone(&self.scheduler))), false));
        }
        let (sender, receiver) = oneshot::channel();
        state.waiting.push((Arc::clone(self), sender));
        self.scheduler.is_contended.store(true, Ordering::Relaxed);
        Turn(Place::Waiting(receiver))
    }

    /// The threads for the tenant's work in the background; without any, those of
    /// the runtime that this is called in.
    pub fn background(&self) -> Handle {
        self.scheduler.guests.clone().unwrap_or_else(Handle::current)
    }

    /// The threads for the tenant's work on files, which may wait: those of the runtime that
    /// this is called in, or nicer ones while the tenant is ahead.
    pub fn threads_for_files(self: &Arc<Self>) -> Handle {
        match &self.scheduler.files {
            Some(nicer) if self.is_ahead() => nicer.clone(),
            _ => Handle::current(),
        }
    }

    /// Counts the tenant among those that want to compute.
    fn see(self: &Arc<Self>) {
        let scheduler = &*self.scheduler;
        self.seen_at.store(scheduler.now(), Ordering::Relaxed);
        let mut owed = CREDIT;
        if !self.is_active.load(Ordering::Relaxed) {
            let mut state = scheduler.lock();
            if !self.is_active.swap(true, Ordering::Relaxed) {
                scheduler.active_weight.fetch_add(self.weight, Ordering::Relaxed);
                state.active.push(Arc::clone(self));
                // It wanted nothing, so it is owed nothing.
                owed = 0;
            }
        }
        let now = scheduler.virtual_time.load(Ordering::Relaxed);
        self.virtual_time.fetch_max(now.saturating_sub(owed), Ordering::Relaxed);
        self.recent_time.fetch_max(now, Ordering::Relaxed);
    }

    /// Processor time used, ever.
    pub fn used(&self) -> Duration {
        Duration::from_micros(self.used.load(Ordering::Relaxed))
    }

    /// Whether the budget of this minute is used up, with as much again as a
    /// tenant may use at a lower share; then the seconds until there is some.
    pub fn exhausted(&self) -> Option<u64> {
        let budget = self.budget.as_ref()?;
        budget.fill();
        let left = budget.left.load(Ordering::Relaxed);
        let debt = -(left + budget.per_minute / 2);
        (debt > 0).then(|| {
            let seconds = debt.saturating_mul(60) / budget.per_minute.max(1);
            u64::try_from(seconds).unwrap_or(60).clamp(1, 60)
        })
    }
}

impl Budget {
    /// Adds what the time since the last call is worth.
    fn fill(&self) {
        let now = u64::try_from(self.base.elapsed().as_micros()).unwrap_or(u64::MAX);
        let before = self.filled_at.load(Ordering::Relaxed);
        // A hundredth of a second at least, so that the rounding is harmless.
        if now.saturating_sub(before) < 10_000
            || self.filled_at.compare_exchange(before, now, Ordering::Relaxed, Ordering::Relaxed).is_err()
        {
            return;
        }
        let passed = i64::try_from(now - before).unwrap_or(i64::MAX).min(60_000_000);
        let gained = i128::from(passed) * i128::from(self.per_minute) / 60_000_000;
        let gained = i64::try_from(gained).unwrap_or(i64::MAX);
        let _ = self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
            Some(left.saturating_add(gained).min(self.per_minute))
        });
    }
}

/// Hands out the slots.
#[derive(Debug)]
pub struct Scheduler {
    state: Mutex<State>,
    slots: u64,
    base: Instant,
    /// What a tenant with its part, no more and no less, would have.
    virtual_time: AtomicU64,
    /// The weights of the active tenants together.
    active_weight: AtomicU64,
    /// Processor time in microseconds since the last survey, which was then.
    charged: AtomicU64,
    surveyed_at: AtomicU64,
    is_busy: AtomicBool,
    /// Whether anyone waits: what most requests ask, without the lock.
    is_contended: AtomicBool,
    /// Whether anyone has a slot.
    is_computing: AtomicBool,
    guests: Option<Handle>,
    files: Option<Handle>,
}

#[derive(Debug)]
struct State {
    free: usize,
    waiting: Vec<(Arc<Share>, oneshot::Sender<Slot>)>,
    active: Vec<Arc<Share>>,
}

/// The right to compute for a slice of time. Goes to the next in line when dropped.
#[derive(Debug)]
pub struct Slot(Option<Arc<Scheduler>>);

/// A place in the line for a slot, from [`Share::turn`].
#[derive(Debug)]
pub struct Turn(Place);

#[derive(Debug)]
enum Place {
    /// One was free. Taken at the second poll, so that other tasks of the
    /// thread come first.
    Free(Slot, bool),
    Waiting(oneshot::Receiver<Slot>),
}

impl Future for Turn {
    type Output = Slot;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Slot> {
        match &mut self.0 {
            Place::Free(slot, true) => Poll::Ready(Slot(slot.0.take())),
            Place::Free(_, is_polled) => {
                *is_polled = true;
                // Behind the tasks that are ready now. tokio's own yield waits
                // until the thread next looks for events, which can be long
                // after, with the slot unused.
                context.waker().wake_by_ref();
                Poll::Pending
            }
            // The sender is dropped only with the scheduler.
            Place::Waiting(slot) => Pin::new(slot).poll(context).map(|slot| slot.unwrap_or(Slot(None))),
        }
    }
}

impl Scheduler {
    /// A scheduler for this machine's processors, with threads for work in the
    /// background; without them it goes on where it is.
    pub fn new(background: Option<&Background>) -> Arc<Scheduler> {
        Scheduler::with_slots(processors(), background)
    }

    fn with_slots(slots: usize, background: Option<&Background>) -> Arc<Scheduler> {
        Arc::new(Scheduler {
            state: Mutex::new(State { free: slots, waiting: Vec::new(), active: Vec::new() }),
            slots: slots as u64,
            base: Instant::now(),
            virtual_time: AtomicU64::new(0),
            active_weight: AtomicU64::new(0),
            charged: AtomicU64::new(0),
            surveyed_at: AtomicU64::new(0),
            is_busy: AtomicBool::new(false),
            is_contended: AtomicBool::new(false),
            is_computing: AtomicBool::new(false),
            guests: background.map(|threads| threads.guests.handle().clone()),
            files: background.map(|threads| threads.files.handle().clone()),
        })
    }

    /// Whether guests compute for long at this moment. Then the epoch has to advance often:
    /// by time, and when a thread of the foreground has nothing to do any more. The one of
    /// the background that goes on there is safe from being interrupted for the next
    /// milliseconds, as the kernel sees it (EEVDF, "run to parity"), even by the thread of the
    /// epoch. At the next tick it gives that up.
    pub fn is_computing(&self) -> bool {
        self.is_computing.load(Ordering::Relaxed)
    }

    /// Counts what was charged; from time to time, looks at how busy the
    /// processors are, and who is still active.
    fn survey(&self, now: u64, charged: u64) {
        let charged = self.charged.fetch_add(charged, Ordering::Relaxed) + charged;
        let before = self.surveyed_at.load(Ordering::Relaxed);
        let passed = now.saturating_sub(before);
        if passed < SURVEY
            || self.surveyed_at.compare_exchange(before, now, Ordering::Relaxed, Ordering::Relaxed).is_err()
        {
            return;
        }
        self.charged.fetch_sub(charged, Ordering::Relaxed);
        let enough = passed.saturating_mul(self.slots) / BUSY;
        self.is_busy.store(charged >= enough, Ordering::Relaxed);
        // What nobody wanted is as good as shared.
        let unused = enough.saturating_sub(charged).saturating_mul(SCALE);
        let active_weight = self.active_weight.load(Ordering::Relaxed).max(1);
        self.virtual_time.fetch_add(unused / active_weight, Ordering::Relaxed);
        let mut state = self.lock();
        state.waiting.retain(|(share, sender)| {
            share.seen_at.store(now, Ordering::Relaxed);
            // Else its request is gone.
            !sender.is_closed()
        });
        state.active.retain(|share| {
            let stays = now.saturating_sub(share.seen_at.load(Ordering::Relaxed)) < LINGER;
            if !stays {
                share.is_active.store(false, Ordering::Relaxed);
                self.active_weight.fetch_sub(share.weight, Ordering::Relaxed);
            }
            stays
        });
    }

    /// Microseconds since the scheduler was made.
    fn now(&self) -> u64 {
        u64::try_from(self.base.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives a slot that is free again to the one who has had the least.
    fn pass_on(self: &Arc<Self>) {
        let mut state = self.lock();
        loop {
            let next = state
                .waiting
                .iter()
                .enumerate()
                .min_by_key(|(_, (share, _))| share.virtual_time.load(Ordering::Relaxed))
                .map(|(index, _)| index);
            let Some(index) = next else {
                state.free += 1;
                self.is_computing.store((state.free as u64) < self.slots, Ordering::Relaxed);
                self.is_contended.store(false, Ordering::Relaxed);
                return;
            };
            // In order of arrival within one tenant: `remove`, not `swap_remove`.
            let (_, sender) = state.waiting.remove(index);
            match sender.send(Slot(Some(Arc::clone(self)))) {
                Ok(()) => return,
                // Its request is gone. Its slot must not come back here while
                // the lock is held.
                Err(mut slot) => slot.0 = None,
            }
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if let Some(scheduler) = self.0.take() {
            scheduler.pass_on();
        }
    }
}

/// One guest's way to the processors: it computes when it is its turn.
#[derive(Debug)]
pub struct Turns {
    share: Arc<Share>,
    standing: Mutex<Standing>,
}

#[derive(Debug, Default)]
struct Standing {
    /// It waits for its turn.
    turn: Option<Turn>,
    /// It has its turn. Given back each time that it stops computing.
    slot: Option<Slot>,
    /// The processor time of its request in microseconds that the slot is good for.
    until: u64,
}

impl Turns {
    /// For one guest of the tenant with this share.
    pub fn new(share: &Arc<Share>) -> Arc<Turns> {
        Arc::new(Turns { share: Arc::clone(share), standing: Mutex::default() })
    }

    /// Whether the guest, whose request has computed for so many microseconds,
    /// must stop until it is its turn. It is then in line already, while it
    /// still computes.
    pub fn is_over(&self, microseconds: u64) -> bool {
        let mut standing = self.lock();
        let is_over = match standing.slot {
            Some(_) => microseconds >= standing.until,
            None => is_long(microseconds) || self.share.is_ahead(),
        };
        if is_over {
            standing.turn = Some(self.share.turn());
        } else if standing.slot.is_some() {
            drop(standing);
            let_others_go_first();
        }
        is_over
    }

    fn lock(&self) -> MutexGuard<'_, Standing> {
        self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the turn that the guest is in line for, if it is.
    fn poll_line(standing: &mut Standing, context: &mut Context<'_>, microseconds: u64) -> Poll<()> {
        let Some(turn) = &mut standing.turn else { return Poll::Ready(()) };
        Pin::new(turn).poll(context).map(|slot| {
            *standing = Standing { turn: None, slot: Some(slot), until: microseconds + SLICE };
        })
    }
}

impl Turnstile for Turns {
    fn poll_turn(&self, context: &mut Context<'_>, microseconds: u64) -> Poll<()> {
        let mut standing = self.lock();
        if standing.turn.is_none() && self.share.is_ahead() {
            standing.turn = Some(self.share.turn());
        }
        let turn = Turns::poll_line(&mut standing, context, microseconds);
        let has_slot = standing.slot.is_some();
        drop(standing);
        if has_slot {
            // As at a tick, for the first one is a while off.
            let_others_go_first();
        }
        turn
    }

    fn computed(&self, microseconds: u64) {
        // Before the slot goes to the one who has had the least.
        self.share.charge(microseconds);
        let Some(slot) = self.lock().slot.take() else { return };
        drop(slot);
        let_others_go_first();
    }
}

/// The turns of a guest that starts. That is short, and has little time: it waits
/// only when it goes on for longer.
#[derive(Debug)]
pub struct Starting<'a>(pub &'a Turns);

impl Turnstile for Starting<'_> {
    fn poll_turn(&self, context: &mut Context<'_>, microseconds: u64) -> Poll<()> {
        Turns::poll_line(&mut self.0.lock(), context, microseconds)
    }

    fn computed(&self, microseconds: u64) {
        self.0.computed(microseconds);
    }
}

/// Lets the kernel run what was woken. Else it first lets the slice of this
/// thread end, and looks at that with its own tick only.
pub fn let_others_go_first() {
    std::thread::yield_now();
}

/// Processor time after which a request goes on in the background.
pub fn is_long(microseconds: u64) -> bool {
    microseconds >= SLICE
}

/// The number of processors that we may use.
pub fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run<T>(future: impl Future<Output = T>) -> T {
        Builder::new_current_thread().build().unwrap().block_on(future)
    }

    /// Shares with these weights in so many processors.
    fn shares<const N: usize>(slots: usize, weights: [u32; N]) -> [Arc<Share>; N] {
        let scheduler = Scheduler::with_slots(slots, None);
        weights.map(|weight| Share::new(&scheduler, weight, None))
    }

    /// Lets tasks of `shares` compute in turns, as requests do
    /// that never end, and returns how many turns each share got of `turns`.
    fn compete(shares: &[(Arc<Share>, usize)], turns: usize) -> Vec<u64> {
        run(async {
            let left = std::rc::Rc::new(std::cell::Cell::new(turns));
            let local = tokio::task::LocalSet::new();
            for (share, tasks) in shares {
                for _ in 0..*tasks {
                    let (share, left) = (Arc::clone(share), left.clone());
                    local.spawn_local(async move {
                        let mut slot = share.turn().await;
                        while left.get() > 0 {
                            left.set(left.get() - 1);
                            // The others have their turns meanwhile.
                            tokio::task::yield_now().await;
                            share.charge(5000);
                            let next = share.turn();
                            drop(slot);
                            slot = next.await;
                        }
                    });
                }
            }
            local.await;
        });
        shares.iter().map(|(share, _)| share.used.load(Ordering::Relaxed) / 5000).collect()
    }

    #[test]
    fn a_share_does_not_depend_on_the_number_of_requests() {
        let [one, many] = shares(1, [1, 1]);
        let turns = compete(&[(one, 1), (many, 20)], 1000);
        assert!(turns[0].abs_diff(500) <= 20, "{turns:?}");
        // One request can use one of two slots, and is to have that whole.
        let [one, many] = shares(2, [1, 1]);
        let turns = compete(&[(one, 1), (many, 20)], 1000);
        assert!(turns[0].abs_diff(500) <= 50, "{turns:?}");
    }

    #[test]
    fn a_share_follows_its_weight() {
        let [light, heavy] = shares(1, [1, 3]);
        let turns = compete(&[(light, 5), (heavy, 5)], 1000);
        assert!(turns[0].abs_diff(250) <= 20, "{turns:?}");
        let [light, heavy] = shares(2, [1, 10]);
        let turns = compete(&[(light, 14), (heavy, 2)], 1000);
        assert!(turns[0].abs_diff(91) <= 30, "{turns:?}");
    }

    #[test]
    fn over_its_budget_a_tenant_goes_slower_and_then_not_at_all() {
        let scheduler = Scheduler::with_slots(1, None);
        let share = Share::new(&scheduler, 1, Some(Duration::from_millis(100)));
        let other = Share::new(&scheduler, 1, None);
        assert_eq!(share.exhausted(), None);
        let turns = compete(&[(Arc::clone(&share), 5), (other, 5)], 300);
        assert!(turns[0] < 60, "{turns:?}");
        share.charge(200_000);
        assert!(share.exhausted().is_some_and(|seconds| (1..=60).contains(&seconds)));
    }

    #[test]
    fn a_request_that_is_gone_does_not_keep_its_slot() {
        run(async {
            let scheduler = Scheduler::with_slots(1, None);
            let share = Share::new(&scheduler, 1, None);
            let held = share.turn().await;
            let mut waiting = share.turn();
            assert!(futures_poll(&mut waiting).await);
            drop(waiting);
            drop(held);
            assert_eq!(scheduler.lock().free, 1);
            // Nor does one that had it, but not yet looked.
            let mut given = share.turn();
            assert!(futures_poll(&mut given).await);
            drop(given);
            assert_eq!(scheduler.lock().free, 1);
        });
    }

    #[test]
    fn what_was_not_used_is_soon_forgotten() {
        let [idle, busy] = shares(2, [1, 1]);
        let scheduler = &idle.scheduler;
        busy.see();
        busy.charge(60_000_000);
        // A tenant that comes back starts where the others are.
        idle.see();
        let now = || scheduler.virtual_time.load(Ordering::Relaxed);
        assert_eq!((now(), idle.virtual_time.load(Ordering::Relaxed)), (60_000_000 * SCALE, now()));
        // One that could have its part, and did not, has it for a while.
        busy.charge(60_000_000);
        idle.see();
        assert_eq!((now(), idle.virtual_time.load(Ordering::Relaxed)), (90_000_000 * SCALE, now() - CREDIT));
        // Nor does the other one have to pay for what nobody else wanted.
        assert_eq!(busy.virtual_time.load(Ordering::Relaxed), now() + CREDIT);
        assert_eq!(busy.recent_time.load(Ordering::Relaxed), now() + LEAD);
    }

    #[test]
    fn what_nobody_wanted_is_as_good_as_shared() {
        let [one, other] = shares(2, [1, 1]);
        let scheduler = &one.scheduler;
        one.see();
        other.see();
        one.charge(20_000);
        let lead = || {
            let now = scheduler.virtual_time.load(Ordering::Relaxed);
            one.recent_time.load(Ordering::Relaxed).saturating_sub(now)
        };
        assert_eq!(lead(), 10_000 * SCALE);
        // A third of two processors for 15 ms, for two tenants.
        scheduler.charged.store(0, Ordering::Relaxed);
        scheduler.survey(scheduler.surveyed_at.load(Ordering::Relaxed) + 15_000, 0);
        assert_eq!(lead(), 5_000 * SCALE);
        scheduler.survey(scheduler.surveyed_at.load(Ordering::Relaxed) + 60_000, 0);
        assert_eq!(lead(), 0);
    }

    #[test]
    fn a_tenant_is_ahead_with_more_than_its_part_while_others_want_some() {
        let [quiet, greedy] = shares(1, [1, 1]);
        let scheduler = &quiet.scheduler;
        scheduler.is_busy.store(true, Ordering::Relaxed);
        assert!(!greedy.is_ahead());
        // So that no survey says how busy it is.
        let charge = |microseconds| {
            scheduler.surveyed_at.store(scheduler.now(), Ordering::Relaxed);
            greedy.charge(microseconds);
        };
        charge(100_000);
        assert!(!greedy.is_ahead(), "there is nobody else");
        assert!(!quiet.is_ahead());
        charge(8_000);
        assert!(!greedy.is_ahead(), "it is by chance");
        charge(8_000);
        assert!(greedy.is_ahead() && !quiet.is_ahead());
        // Nor does it help to have wanted nothing before.
        let now = scheduler.virtual_time.fetch_add(CREDIT, Ordering::Relaxed) + CREDIT;
        assert!(!greedy.is_ahead());
        charge(12_000);
        assert!(greedy.is_ahead() && greedy.virtual_time.load(Ordering::Relaxed) < now);
        scheduler.is_busy.store(false, Ordering::Relaxed);
        assert!(!greedy.is_ahead(), "there is room for all");
        // Who has gone away wants nothing.
        scheduler.is_busy.store(true, Ordering::Relaxed);
        let later = scheduler.now() + LINGER;
        greedy.seen_at.store(later, Ordering::Relaxed);
        scheduler.survey(later, 0);
        scheduler.is_busy.store(true, Ordering::Relaxed);
        assert!(!greedy.is_ahead());
        assert_eq!(scheduler.active_weight.load(Ordering::Relaxed), 1);
    }

    /// Polls once; true if it is not ready.
    async fn futures_poll<F: Future + Unpin>(future: &mut F) -> bool {
        std::future::poll_fn(|context| Poll::Ready(Pin::new(&mut *future).poll(context).is_pending())).await
    }
}
