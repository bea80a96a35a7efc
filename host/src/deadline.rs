//! The time that a guest has left, shared by the two clocks that enforce it.
//!
//! The epoch reaches a guest that computes, at its next loop or call. A timer
//! outside reaches one that waits in a host function. Neither alone is enough.
//!
//! The time runs only while the guest is at work: waiting for a slow client
//! has its own limit, so that a large download over a slow line is not cut.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Poll;
use std::time::{Duration, Instant};

/// A point in time that the guest's work must not pass.
#[derive(Clone, Debug)]
pub struct Deadline(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    base: Instant,
    /// Microseconds after `base`, or [`NEVER`].
    at: AtomicU64,
}

/// No deadline: between requests, while the client is awaited, or for a
/// command without a limit.
const NEVER: u64 = u64::MAX;

/// The deadline passed.
#[derive(Clone, Copy, Debug)]
pub struct Elapsed;

impl std::fmt::Display for Elapsed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the time limit was reached")
    }
}

impl std::error::Error for Elapsed {}

impl Deadline {
    /// A deadline that is not set.
    pub fn never() -> Deadline {
        Deadline(Arc::new(Shared { base: Instant::now(), at: AtomicU64::new(NEVER) }))
    }

    /// Sets the deadline to `limit` from now, or to never.
    pub fn set(&self, limit: Option<Duration>) {
        let at = match limit {
            Some(limit) => self.now().saturating_add(microseconds(limit)),
            None => NEVER,
        };
        self.0.at.store(at, Ordering::Relaxed);
    }

    /// Whether the deadline passed.
    pub fn passed(&self) -> bool {
        self.now() >= self.0.at.load(Ordering::Relaxed)
    }

    /// Stops the time until the guard is dropped; then the guest has again
    /// what was left.
    pub fn pause(&self) -> Pause<'_> {
        Pause { deadline: self, since: self.now(), at: self.0.at.swap(NEVER, Ordering::Relaxed) }
    }

    /// Runs `work` until it is done or the deadline passes.
    ///
    /// # Errors
    ///
    /// [`Elapsed`]; `work` is then dropped where it stands.
    pub async fn enforce<T>(&self, work: impl Future<Output = T>) -> Result<T, Elapsed> {
        let mut work = pin!(work);
        // Most requests are done at the first poll and need no timer.
        let mut timer: Option<(u64, std::pin::Pin<Box<tokio::time::Sleep>>)> = None;
        poll_fn(|context| {
            if let Poll::Ready(done) = work.as_mut().poll(context) {
                return Poll::Ready(Ok(done));
            }
            // The work may have moved the deadline.
            let at = self.0.at.load(Ordering::Relaxed);
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

/// A stopped clock; see [`Deadline::pause`].
#[derive(Debug)]
pub struct Pause<'a> {
    deadline: &'a Deadline,
    since: u64,
    at: u64,
}

impl Drop for Pause<'_> {
    fn drop(&mut self) {
        if self.at != NEVER {
            let waited = self.deadline.now() - self.since;
            self.deadline.0.at.store(self.at.saturating_add(waited), Ordering::Relaxed);
        }
    }
}

fn microseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(NEVER - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(future)
    }

    #[test]
    fn work_that_waits_is_stopped() {
        block_on(async {
            let deadline = Deadline::never();
            deadline.set(Some(Duration::from_millis(5)));
            assert!(deadline.enforce(std::future::pending::<()>()).await.is_err());
            assert!(deadline.passed());
        });
    }

    #[test]
    fn time_does_not_run_during_a_pause() {
        block_on(async {
            let deadline = Deadline::never();
            deadline.set(Some(Duration::from_millis(200)));
            let done = deadline
                .enforce(async {
                    let pause = deadline.pause();
                    tokio::time::sleep(Duration::from_millis(300)).await;
                    assert!(!deadline.passed());
                    drop(pause);
                    7
                })
                .await;
            assert_eq!(done.unwrap(), 7);
            assert!(!deadline.passed());
        });
    }

    #[test]
    fn a_deadline_set_by_the_work_itself_holds() {
        block_on(async {
            let deadline = Deadline::never();
            let stopped = deadline
                .enforce(async {
                    tokio::task::yield_now().await;
                    deadline.set(Some(Duration::from_millis(5)));
                    std::future::pending::<()>().await;
                })
                .await;
            assert!(stopped.is_err());
        });
    }
}
