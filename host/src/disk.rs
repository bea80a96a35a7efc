//! Work that may wait for a disk, off the runtime's threads.
//!
//! A tenant has places for some at a time, so that its disk's slowness, or its
//! greed, takes not all of the host's threads. What finds no place waits. The
//! processor time of the work is the tenant's own, and while it is ahead, the
//! work gives way to everybody else's.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::runtime::Handle;
use tokio::task::JoinHandle;

use crate::footprint::Footprint;
use crate::scheduler::Share;

/// Work that was begun. It is done to its end, whoever waits for it. Comes to
/// none if it panicked, or the server stops.
#[derive(Debug)]
pub struct Work<T>(JoinHandle<Option<T>>);

/// Begins `work` of the tenant with this footprint.
pub fn begin<T: Send + 'static>(footprint: &Footprint, work: impl FnOnce() -> T + Send + 'static) -> Work<T> {
    let places = Arc::clone(footprint.disk_places());
    let share = footprint.share().cloned();
    let threads = share.as_ref().map_or_else(Handle::current, Share::threads_for_files);
    let work = move || match share {
        Some(share) => share.charged(work).0,
        None => work(),
    };
    Work(match Arc::clone(&places).try_acquire_owned() {
        // Held by the work, not by the request: that may be gone before.
        Ok(place) => threads.spawn_blocking(move || {
            let _place = place;
            Some(work())
        }),
        // A task, for a place that is meant for one who is not polled is lost.
        Err(_) => tokio::spawn(async move {
            let place = places.acquire_owned().await.ok()?;
            let work = move || {
                let _place = place;
                work()
            };
            threads.spawn_blocking(work).await.ok()
        }),
    })
}

impl<T> Future for Work<T> {
    type Output = Option<T>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<T>> {
        Pin::new(&mut self.0).poll(context).map(|done| done.ok().flatten())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::thread_time;
    use crate::footprint::Together;
    use crate::scheduler::Scheduler;
    use std::sync::mpsc;

    #[tokio::test]
    async fn what_finds_no_place_waits_and_is_done_all_the_same() {
        let footprint = Footprint::new(None);
        let (sender, begun) = mpsc::channel();
        let mut gates = Vec::new();
        for _ in 0..40 {
            let (gate, wait) = mpsc::channel::<()>();
            gates.push(gate);
            let sender = sender.clone();
            // Nobody waits for it.
            drop(begin(&footprint, move || {
                sender.send(()).unwrap();
                wait.recv().unwrap_err();
            }));
        }
        let places = footprint.disk_places();
        (0..16).for_each(|_| begun.recv().unwrap());
        assert!(begun.try_recv().is_err() && places.available_permits() == 0);
        drop(gates);
        // The other tasks of this thread are those that wait for a place.
        let all = tokio::task::spawn_blocking(move || (0..24).for_each(|_| begun.recv().unwrap()));
        all.await.unwrap();
        let _all = places.acquire_many(16).await.unwrap();
        assert_eq!(begin(&Footprint::new(None), || 7).await, Some(7));
    }

    #[tokio::test]
    async fn its_processor_time_is_charged_and_its_waits_are_not() {
        let share = Share::new(&Scheduler::new(None), 1, None);
        let footprint = Footprint::within(None, &share, &Together::new(u64::MAX));
        let compute = || {
            let before = thread_time();
            while thread_time() < before + 5000 {}
        };
        begin(&footprint, compute).await.unwrap();
        assert!((5..1000).contains(&share.used().as_millis()), "{:?}", share.used());
        let before = share.used();
        let (gate, wait) = mpsc::channel::<()>();
        let waiting = begin(&footprint, move || wait.recv());
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        drop(gate);
        waiting.await.unwrap().unwrap_err();
        assert!((share.used() - before).as_millis() < 40);
    }
}
