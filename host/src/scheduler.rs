//! Who may compute when all processors are busy.
//!
//! A request that is done within one tick of the epoch starts at once, as long
//! as its tenant has not had more than others. One that computes for longer
//! needs a [`Slot`] for each further tick. There are as many slots as
//! processors, and when more want one than there are, the tenant that has had
//! the least processor time for its weight goes first. So a tenant's share does
//! not depend on how many requests it has open.
//!
//! The runtime has more threads than there are slots: a new, short request
//! finds a free thread at once, and the kernel gives that one precedence over
//! those that compute.

use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

/// Processor time, scaled, that a tenant may be ahead of the others before its
/// new requests wait for a slot too.
const HEAD_START: u64 = 50_000;

/// Processor time, scaled, that a tenant may be behind the others and still be
/// owed. One that has fewer requests at work than its share allows can not use
/// it all, and must not save it up for later.
const CREDIT: u64 = 20_000_000;

/// How much slower a tenant without budget goes.
const PENALTY: u64 = 10;

/// A tenant's part in the use of the processors.
#[derive(Debug)]
pub struct Share {
    weight: u64,
    /// Processor time in microseconds by weight: the one who has least of it
    /// goes first.
    virtual_time: AtomicU64,
    /// Processor time in microseconds, ever.
    used: AtomicU64,
    /// Slots that its requests have or wait for. Changed under the scheduler's
    /// lock.
    active: AtomicUsize,
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
    over: AtomicBool,
}

impl Share {
    /// A share with `weight` relative to others, and a budget for each minute.
    pub fn new(weight: u32, cpu_per_minute: Option<Duration>) -> Arc<Share> {
        let budget = cpu_per_minute.map(|time| {
            let per_minute = i64::try_from(time.as_micros()).unwrap_or(i64::MAX);
            Budget {
                per_minute,
                base: Instant::now(),
                left: AtomicI64::new(per_minute),
                filled_at: AtomicU64::new(0),
                over: AtomicBool::new(false),
            }
        });
        Arc::new(Share {
            weight: u64::from(weight.max(1)),
            virtual_time: AtomicU64::new(0),
            used: AtomicU64::new(0),
            active: AtomicUsize::new(0),
            budget,
        })
    }

    /// Notes that `microseconds` of processor time were used.
    pub fn charge(&self, microseconds: u64) {
        self.used.fetch_add(microseconds, Ordering::Relaxed);
        let mut scaled = microseconds.saturating_mul(100) / self.weight;
        if let Some(budget) = &self.budget {
            budget.fill();
            let spent = i64::try_from(microseconds).unwrap_or(i64::MAX);
            let left = budget.left.fetch_sub(spent, Ordering::Relaxed) - spent;
            budget.over.store(left < 0, Ordering::Relaxed);
            if left < 0 {
                scaled = scaled.saturating_mul(PENALTY);
            }
        }
        self.virtual_time.fetch_add(scaled, Ordering::Relaxed);
    }

    /// Raises the virtual time to at least `time`, and returns it.
    fn rise_to(&self, time: u64) -> u64 {
        self.virtual_time.fetch_max(time, Ordering::Relaxed).max(time)
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
    slots: usize,
    /// Guests that compute at this moment, with a slot or in their first tick.
    computing: AtomicUsize,
    /// Whether anyone waits: what most requests ask, without the lock.
    contended: AtomicBool,
}

#[derive(Debug)]
struct State {
    free: usize,
    waiting: Vec<(Arc<Share>, oneshot::Sender<Slot>)>,
    /// The most virtual time that any tenant had when it got a slot. One that
    /// comes back after a rest starts here: idle time can not be saved up.
    floor: u64,
}

/// The right to compute for one tick. Goes to the next in line when dropped.
#[derive(Debug)]
pub struct Slot(Option<(Arc<Scheduler>, Arc<Share>)>);

/// A place in the line for a slot, from [`Scheduler::turn`].
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
    /// A scheduler for this machine's processors.
    pub fn new() -> Arc<Scheduler> {
        Scheduler::with_slots(processors())
    }

    fn with_slots(slots: usize) -> Arc<Scheduler> {
        Arc::new(Scheduler {
            state: Mutex::new(State { free: slots, waiting: Vec::new(), floor: 0 }),
            slots,
            computing: AtomicUsize::new(0),
            contended: AtomicBool::new(false),
        })
    }

    /// Gets in line for a slot. At once, and not when the result is first
    /// polled: a request that has a slot and wants the next one must be in line
    /// when it gives its own up, or it would be passed over by those that are.
    pub fn turn(self: &Arc<Self>, share: &Arc<Share>) -> Turn {
        let mut state = self.lock();
        // One that had nothing at work has nothing to be owed.
        let owed = if share.active.fetch_add(1, Ordering::Relaxed) == 0 { 0 } else { CREDIT };
        let since = share.rise_to(state.floor.saturating_sub(owed));
        if state.free > 0 {
            state.free -= 1;
            state.floor = state.floor.max(since);
            return Turn(Place::Free(Slot(Some((Arc::clone(self), Arc::clone(share)))), false));
        }
        let (sender, receiver) = oneshot::channel();
        state.waiting.push((Arc::clone(share), sender));
        self.contended.store(true, Ordering::Relaxed);
        Turn(Place::Waiting(receiver))
    }

    /// Whether a new request of `share` should wait for its turn: the
    /// processors are busy, and its tenant has had more than others.
    pub fn is_ahead(&self, share: &Share) -> bool {
        let is_busy =
            self.contended.load(Ordering::Relaxed) || self.computing.load(Ordering::Relaxed) >= self.slots;
        if !is_busy {
            return false;
        }
        let state = self.lock();
        share.rise_to(state.floor.saturating_sub(CREDIT)) > state.floor.saturating_add(HEAD_START)
    }

    /// Counts a guest that computes, until it stops.
    pub fn computes(&self, starts: bool) {
        if starts {
            self.computing.fetch_add(1, Ordering::Relaxed);
        } else {
            self.computing.fetch_sub(1, Ordering::Relaxed);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the slot that `from` has done with to the one who has had the least.
    fn pass_on(self: &Arc<Self>, from: &Share) {
        let mut state = self.lock();
        from.active.fetch_sub(1, Ordering::Relaxed);
        loop {
            let next = state
                .waiting
                .iter()
                .enumerate()
                .min_by_key(|(_, (share, _))| share.virtual_time.load(Ordering::Relaxed))
                .map(|(index, _)| index);
            let Some(index) = next else {
                state.free += 1;
                self.contended.store(false, Ordering::Relaxed);
                return;
            };
            // In order of arrival within one tenant: `remove`, not `swap_remove`.
            let (share, sender) = state.waiting.remove(index);
            if sender.is_closed() {
                share.active.fetch_sub(1, Ordering::Relaxed);
                continue;
            }
            let floor = state.floor.max(share.virtual_time.load(Ordering::Relaxed));
            match sender.send(Slot(Some((Arc::clone(self), Arc::clone(&share))))) {
                Ok(()) => {
                    state.floor = floor;
                    return;
                }
                // Its request was dropped just now. Its slot must not come
                // back here while the lock is held.
                Err(mut slot) => {
                    slot.0 = None;
                    share.active.fetch_sub(1, Ordering::Relaxed);
                }
            }
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if let Some((scheduler, share)) = self.0.take() {
            scheduler.pass_on(&share);
        }
    }
}

/// The number of processors that we may use.
pub fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
    }

    /// Lets tasks of `shares` compute in turns of so many slots, as requests do
    /// that never end, and returns how many turns each share got of `turns`.
    fn compete(slots: usize, shares: &[(Arc<Share>, usize)], turns: usize) -> Vec<u64> {
        let scheduler = Scheduler::with_slots(slots);
        run(async {
            let left = std::rc::Rc::new(std::cell::Cell::new(turns));
            let local = tokio::task::LocalSet::new();
            for (share, tasks) in shares {
                for _ in 0..*tasks {
                    let (share, scheduler, left) = (Arc::clone(share), Arc::clone(&scheduler), left.clone());
                    local.spawn_local(async move {
                        let mut slot = scheduler.turn(&share).await;
                        while left.get() > 0 {
                            left.set(left.get() - 1);
                            // The others have their turns meanwhile.
                            tokio::task::yield_now().await;
                            share.charge(5000);
                            let next = scheduler.turn(&share);
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
        let (one, many) = (Share::new(1, None), Share::new(1, None));
        let turns = compete(1, &[(one, 1), (many, 20)], 1000);
        assert!(turns[0].abs_diff(500) <= 20, "{turns:?}");
        // One request can use one of two slots, and is to have that whole.
        let (one, many) = (Share::new(1, None), Share::new(1, None));
        let turns = compete(2, &[(one, 1), (many, 20)], 1000);
        assert!(turns[0].abs_diff(500) <= 50, "{turns:?}");
    }

    #[test]
    fn a_share_follows_its_weight() {
        let (light, heavy) = (Share::new(1, None), Share::new(3, None));
        let turns = compete(1, &[(light, 5), (heavy, 5)], 1000);
        assert!(turns[0].abs_diff(250) <= 20, "{turns:?}");
        let (light, heavy) = (Share::new(1, None), Share::new(10, None));
        let turns = compete(2, &[(light, 14), (heavy, 2)], 1000);
        assert!(turns[0].abs_diff(91) <= 30, "{turns:?}");
    }

    #[test]
    fn over_its_budget_a_tenant_goes_slower_and_then_not_at_all() {
        let share = Share::new(1, Some(Duration::from_millis(100)));
        let other = Share::new(1, None);
        assert_eq!(share.exhausted(), None);
        let turns = compete(1, &[(Arc::clone(&share), 5), (other, 5)], 300);
        assert!(turns[0] < 60, "{turns:?}");
        share.charge(200_000);
        assert!(share.exhausted().is_some_and(|seconds| (1..=60).contains(&seconds)));
    }

    #[test]
    fn a_request_that_is_gone_does_not_keep_its_slot() {
        run(async {
            let scheduler = Scheduler::with_slots(1);
            let share = Share::new(1, None);
            let held = scheduler.turn(&share).await;
            let mut waiting = scheduler.turn(&share);
            assert!(futures_poll(&mut waiting).await);
            drop(waiting);
            drop(held);
            assert_eq!(scheduler.lock().free, 1);
            // Nor does one that had it, but not yet looked.
            let mut given = scheduler.turn(&share);
            assert!(futures_poll(&mut given).await);
            drop(given);
            assert_eq!((scheduler.lock().free, share.active.load(Ordering::Relaxed)), (1, 0));
        });
    }

    #[test]
    fn what_was_not_used_is_soon_forgotten() {
        let (idle, busy) = (Share::new(1, None), Share::new(1, None));
        let scheduler = Scheduler::with_slots(2);
        run(async {
            let held = scheduler.turn(&busy).await;
            busy.charge(60_000_000);
            drop(scheduler.turn(&busy).await);
            drop(held);
            // A tenant that comes back starts where the others are.
            drop(scheduler.turn(&idle).await);
            assert_eq!(idle.virtual_time.load(Ordering::Relaxed), busy.virtual_time.load(Ordering::Relaxed));
        });
    }

    /// Polls once; true if it is not ready.
    async fn futures_poll<F: Future + Unpin>(future: &mut F) -> bool {
        std::future::poll_fn(|context| Poll::Ready(Pin::new(&mut *future).poll(context).is_pending())).await
    }
}
