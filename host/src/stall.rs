//! Ends an HTTP/2 stream whose client takes nothing of the response, or takes
//! too long for all of it.
//!
//! A client can hold a stream open by never granting it a window, while the
//! connection itself makes progress. Neither hyper nor h2 has a limit for
//! that, and the instance behind the stream would be held with it.

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Instant, Sleep};

tokio::task_local! {
    static CURRENT: Stall;
}

/// Says whether a piece of a response waits to be taken by the client, and when
/// the response has to be complete.
#[derive(Clone, Default)]
pub struct Stall(Arc<State>);

#[derive(Default)]
struct State {
    waits: AtomicBool,
    end: OnceLock<Instant>,
}

impl Stall {
    /// That of the stream in whose task this is called.
    pub fn current() -> Option<Stall> {
        CURRENT.try_with(Clone::clone).ok()
    }

    /// The response has to be complete by then.
    pub fn end_at(&self, end: Instant) {
        // A stream has one response.
        let _ = self.0.end.set(end);
    }

    /// The body has given a piece away.
    pub fn given(&self) {
        self.0.waits.store(true, Ordering::Relaxed);
    }

    /// The body was asked for the next piece: the last one is on its way.
    pub fn taken(&self) {
        self.0.waits.store(false, Ordering::Relaxed);
    }

    fn waits(&self) -> bool {
        self.0.waits.load(Ordering::Relaxed)
    }
}

/// A stream's task with that limit.
pub struct Watched<F> {
    stream: Pin<Box<F>>,
    stall: Stall,
    limit: Duration,
    timer: Option<Pin<Box<Sleep>>>,
    end_timer: Option<Pin<Box<Sleep>>>,
}

impl<F: Future<Output = ()>> Watched<F> {
    /// Ends `stream` when what `stall` tells of waits for longer than `limit`,
    /// or its end has come.
    pub fn new(stream: F, stall: Stall, limit: Duration) -> Watched<F> {
        Watched { stream: Box::pin(stream), stall, limit, timer: None, end_timer: None }
    }
}

impl<F: Future<Output = ()>> Future for Watched<F> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let watched = &mut *self;
        let polled = CURRENT.sync_scope(watched.stall.clone(), || watched.stream.as_mut().poll(context));
        if polled.is_ready() {
            return Poll::Ready(());
        }
        if let Some(end) = watched.stall.0.end.get() {
            let timer = watched.end_timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(*end)));
            if timer.as_mut().poll(context).is_ready() {
                return Poll::Ready(());
            }
        }
        if !watched.stall.waits() {
            watched.timer = None;
            return Poll::Pending;
        }
        let limit = watched.limit;
        let timer = watched.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep(limit)));
        timer.as_mut().poll(context)
    }
}
