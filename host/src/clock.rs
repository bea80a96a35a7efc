//! The time of one guest: how long it may take, and how long it computed.
//!
//! Two clocks enforce the deadline. The epoch reaches a guest that computes,
//! at its next loop or call. A timer outside reaches one that waits in a host
//! function. Neither alone is enough.
//!
//! The deadline runs only while the guest is at work: waiting for a slow
//! client has its own limit, so that a large download over a slow line is not
//! cut. And it begins anew with each piece of a response that was handed over:
//! what bounds a stream as a whole is the time of a response. Processor time is
//! what the kernel counts for the thread while it polls the guest's future: on a
//! busy machine it is much less than the time that passes, and a tenant must not
//! pay for what others do.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

/// The clock of one guest. Clones are the same clock.
#[derive(Clone, Debug)]
pub struct Clock(Arc<Shared>);

/// All times are microseconds after `base`, or lengths in microseconds.
#[derive(Debug)]
struct Shared {
    base: Instant,
    /// When the guest's time is up, or [`NEVER`].
    deadline: AtomicU64,
    /// How long it had when that began.
    limit: AtomicU64,
    /// Processor time that the request may take, or [`NEVER`].
    cpu_limit: AtomicU64,
    /// Processor time of the request, without the poll that is under way.
    cpu_used: AtomicU64,
    /// The thread's own processor time when it began the poll that is under
    /// way, or [`NEVER`]. Read in that poll only.
    polled_at: AtomicU64,
    /// How long before each limit the guest should stop by itself.
    margin: AtomicU64,
    cpu_margin: AtomicU64,
    /// Whether it was told so.
    told: AtomicBool,
}

/// No deadline: between requests, while the client is awaited, or for a
/// command without a limit.
const NEVER: u64 = u64::MAX;

/// Microseconds within which the time that passed stands for processor time.
const SHORT: u64 = 200;

/// What work passes each time before it computes; see [`Clock::enforce`].
pub trait Turnstile {
    /// Waits until the work may compute, which has done so for so many
    /// microseconds.
    fn poll_turn(&self, context: &mut Context<'_>, microseconds: u64) -> Poll<()>;

    /// The work has computed for so many microseconds more.
    fn computed(&self, microseconds: u64);
}

/// A limit was reached.
#[derive(Clone, Copy, Debug)]
pub struct Elapsed;

impl std::fmt::Display for Elapsed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the time limit was reached")
    }
}

impl std::error::Error for Elapsed {}

impl Clock {
    /// A clock without limits.
    pub fn new() -> Clock {
        Clock(Arc::new(Shared {
            base: Instant::now(),
            deadline: AtomicU64::new(NEVER),
            limit: AtomicU64::new(NEVER),
            cpu_limit: AtomicU64::new(NEVER),
            cpu_used: AtomicU64::new(0),
            polled_at: AtomicU64::new(NEVER),
            margin: AtomicU64::new(0),
            cpu_margin: AtomicU64::new(0),
            told: AtomicBool::new(false),
        }))
    }

    /// Starts a piece of work that may take `limit` from now, and `cpu` of
    /// processor time.
    pub fn start(&self, limit: Option<Duration>, cpu: Option<Duration>) {
        let deadline = limit.map_or(NEVER, |limit| self.now().saturating_add(microseconds(limit)));
        self.0.deadline.store(deadline, Ordering::Relaxed);
        self.0.limit.store(limit.map_or(NEVER, microseconds), Ordering::Relaxed);
        self.0.cpu_limit.store(cpu.map_or(NEVER, microseconds), Ordering::Relaxed);
        self.0.cpu_used.store(0, Ordering::Relaxed);
        self.0.margin.store(limit.map_or(0, margin), Ordering::Relaxed);
        self.0.cpu_margin.store(cpu.map_or(0, margin), Ordering::Relaxed);
        self.0.told.store(false, Ordering::Relaxed);
    }

    /// Microseconds after which the guest should stop by itself, [`u64::MAX`]
    /// if there is no limit.
    pub fn time_left(&self) -> u64 {
        let left = |limit: u64, margin: &AtomicU64, used: u64| match limit {
            NEVER => NEVER,
            limit => limit.saturating_sub(margin.load(Ordering::Relaxed)).saturating_sub(used),
        };
        let shared = &*self.0;
        let left = left(shared.deadline.load(Ordering::Relaxed), &shared.margin, self.now()).min(left(
            shared.cpu_limit.load(Ordering::Relaxed),
            &shared.cpu_margin,
            self.cpu_used(),
        ));
        if left == 0 {
            shared.told.store(true, Ordering::Relaxed);
        }
        left
    }

    /// Whether the guest was told to stop since [`Clock::start`].
    pub fn was_told(&self) -> bool {
        self.0.told.load(Ordering::Relaxed)
    }

    /// Whether a limit is reached.
    pub fn passed(&self) -> bool {
        self.now() >= self.0.deadline.load(Ordering::Relaxed)
            || self.cpu_used() >= self.0.cpu_limit.load(Ordering::Relaxed)
    }

    /// Processor time in microseconds since [`Clock::start`].
    pub fn cpu_used(&self) -> u64 {
        let polled_at = self.0.polled_at.load(Ordering::Relaxed);
        let running = if polled_at == NEVER { 0 } else { thread_time().saturating_sub(polled_at) };
        self.0.cpu_used.load(Ordering::Relaxed) + running
    }

    /// Counts processor time that was spent for the guest elsewhere.
    pub fn spend(&self, time: Duration) {
        self.0.cpu_used.fetch_add(microseconds(time), Ordering::Relaxed);
    }

    /// Stops the deadline until the guard is dropped; then the guest has again
    /// what was left.
    pub fn pause(&self) -> Pause<'_> {
        Pause { clock: self, since: self.now(), deadline: self.0.deadline.swap(NEVER, Ordering::Relaxed) }
    }

    /// Moves the deadline by `time` in which the guest could not go on.
    pub fn postpone(&self, time: Duration) {
        let moved = |deadline: u64| (deadline != NEVER).then(|| deadline.saturating_add(microseconds(time)));
        // None: it is paused, or there is no limit.
        let _ = self.0.deadline.fetch_update(Ordering::Relaxed, Ordering::Relaxed, moved);
    }

    /// Runs `work`, each time that `turns` lets it, until it is done or its time
    /// is up.
    ///
    /// # Errors
    ///
    /// [`Elapsed`]; `work` is then dropped where it stands.
    pub async fn enforce<T>(
        &self,
        work: impl Future<Output = T>,
        turns: &impl Turnstile,
    ) -> Result<T, Elapsed> {
        let mut work = pin!(work);
        // Most requests are done at the first poll and need no timer.
        let mut timer: Option<(u64, std::pin::Pin<Box<tokio::time::Sleep>>)> = None;
        poll_fn(|context| {
            if turns.poll_turn(context, self.0.cpu_used.load(Ordering::Relaxed)).is_ready() {
                let (started, since) = (thread_time(), self.now());
                self.0.polled_at.store(started, Ordering::Relaxed);
                let polled = work.as_mut().poll(context);
                self.0.polled_at.store(NEVER, Ordering::Relaxed);
                // The thread's time costs a system call. In so little time that
                // passed, it can not be much less.
                let passed = self.now() - since;
                let used = if passed < SHORT { passed } else { thread_time().saturating_sub(started) };
                self.0.cpu_used.fetch_add(used, Ordering::Relaxed);
                turns.computed(used);
                if let Poll::Ready(done) = polled {
                    return Poll::Ready(Ok(done));
                }
            }
            // The work may have moved the deadline.
            let at = self.0.deadline.load(Ordering::Relaxed);
            if at == NEVER {
                timer = None;
                return Poll::Pending;
            }
            let instant = tokio::time::Instant::from_std(self.0.base + Duration::from_micros(at));
            let (armed, sleep) =
                timer.get_or_insert_with(|| (at, Box::pin(tokio::time::sleep_until(instant))));
            if *armed != at {
                sleep.as_mut().reset(instant);
                *armed = at;
            }
            sleep.as_mut().poll(context).map(|()| Err(Elapsed))
        })
        .await
    }

    fn now(&self) -> u64 {
        microseconds(self.0.base.elapsed())
    }
}

/// A stopped clock; see [`Clock::pause`].
#[derive(Debug)]
pub struct Pause<'a> {
    clock: &'a Clock,
    since: u64,
    deadline: u64,
}

impl Pause<'_> {
    /// Ends the pause, and gives the guest all of its time again, for a further
    /// piece of work. The limit of processor time goes on.
    pub fn renew(mut self) {
        if self.deadline != NEVER {
            self.since = self.clock.now();
            self.deadline = self.since.saturating_add(self.clock.0.limit.load(Ordering::Relaxed));
            self.clock.0.told.store(false, Ordering::Relaxed);
        }
    }
}

impl Drop for Pause<'_> {
    fn drop(&mut self) {
        if self.deadline != NEVER {
            let waited = self.clock.now() - self.since;
            self.clock.0.deadline.store(self.deadline.saturating_add(waited), Ordering::Relaxed);
        }
    }
}

/// How long before `limit` a guest should stop by itself: time to unwind and to
/// write a traceback.
fn margin(limit: Duration) -> u64 {
    microseconds((limit / 10).min(Duration::from_secs(1)))
}

/// Processor time of this thread in microseconds.
pub fn thread_time() -> u64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    // Neither is negative.
    time.tv_sec.unsigned_abs() * 1_000_000 + time.tv_nsec.unsigned_abs() / 1000
}

fn microseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(NEVER - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// It may compute at all times.
    struct Free;

    impl Turnstile for Free {
        fn poll_turn(&self, _: &mut Context<'_>, _: u64) -> Poll<()> {
            Poll::Ready(())
        }

        fn computed(&self, _: u64) {}
    }

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(future)
    }

    #[test]
    fn work_that_waits_is_stopped() {
        block_on(async {
            let clock = Clock::new();
            clock.start(Some(Duration::from_millis(5)), None);
            assert!(clock.enforce(std::future::pending::<()>(), &Free).await.is_err());
            assert!(clock.passed());
        });
    }

    #[test]
    fn time_does_not_run_during_a_pause() {
        block_on(async {
            let clock = Clock::new();
            clock.start(Some(Duration::from_millis(200)), None);
            let done = clock
                .enforce(
                    async {
                        let pause = clock.pause();
                        tokio::time::sleep(Duration::from_millis(300)).await;
                        assert!(!clock.passed());
                        drop(pause);
                        7
                    },
                    &Free,
                )
                .await;
            assert_eq!(done.unwrap(), 7);
            assert!(!clock.passed());
        });
    }

    #[test]
    fn time_is_renewed_and_not_processor_time() {
        let clock = Clock::new();
        let limit = Duration::from_millis(50);
        clock.start(Some(limit), Some(Duration::from_secs(100)));
        while clock.time_left() > 0 {}
        assert!(clock.was_told());
        clock.spend(Duration::from_secs(99));
        clock.pause().renew();
        assert!(!clock.was_told() && !clock.passed());
        assert!(clock.0.deadline.load(Ordering::Relaxed) >= clock.now().saturating_add(20_000));
        clock.spend(Duration::from_secs(1));
        assert!(clock.passed());
        // Without a limit there is none afterwards.
        clock.start(None, None);
        clock.pause().renew();
        assert!(!clock.passed() && clock.time_left() == u64::MAX);
    }

    #[test]
    fn a_deadline_set_by_the_work_itself_holds() {
        block_on(async {
            let clock = Clock::new();
            let stopped = clock
                .enforce(
                    async {
                        tokio::task::yield_now().await;
                        clock.start(Some(Duration::from_millis(5)), None);
                        std::future::pending::<()>().await;
                    },
                    &Free,
                )
                .await;
            assert!(stopped.is_err());
        });
    }

    #[test]
    fn a_guest_is_told_before_its_time_is_up() {
        let clock = Clock::new();
        assert_eq!((clock.time_left(), clock.was_told()), (u64::MAX, false));
        clock.start(Some(Duration::from_secs(100)), None);
        assert!((90_000_000..99_000_001).contains(&clock.time_left()));
        clock.start(Some(Duration::from_secs(100)), Some(Duration::ZERO));
        assert!(clock.time_left() == 0 && clock.was_told());
        clock.start(Some(Duration::from_millis(1)), None);
        while clock.time_left() > 0 {}
        assert!(clock.was_told());
        clock.start(None, None);
        assert!(!clock.was_told());
    }

    #[test]
    fn processor_time_is_what_polls_take() {
        block_on(async {
            let clock = Clock::new();
            clock.start(None, Some(Duration::from_millis(20)));
            let done = clock
                .enforce(
                    async {
                        tokio::time::sleep(Duration::from_millis(30)).await;
                        assert!(!clock.passed(), "waiting is not computing");
                        // Not by the time that passes, in which others may compute.
                        let start = thread_time();
                        while thread_time() < start + 25_000 {}
                        assert!(clock.passed());
                    },
                    &Free,
                )
                .await;
            assert!(done.is_ok());
            assert!((25_000..1_000_000).contains(&clock.cpu_used()));
        });
    }
}
