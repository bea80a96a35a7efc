//! What a tenant holds of the host: its memory, in one number for all of it,
//! and places for the files that are sent and for the work on disks.
//!
//! In the number are the linear memories and tables of its instances, the
//! files in their `/tmp`, and what the host itself holds for them: an
//! instance's own state, heads and bodies of requests and responses on their
//! way, what compresses them, blocks of files. Linear memory counts in full, though pages that an
//! instance has not written to are shared with others.
//!
//! Instances may have no more than seven eighths of the limit. So those that
//! rest never fill it to the last byte, and leave no room for a request.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use crate::scheduler::Share;

/// What an instance costs the host besides its memory: the store, the part of
/// the fiber's stack that is in use, and lines of the log that are not complete.
pub const INSTANCE: u64 = 128 << 10;

/// What a request or a response on its way costs the host besides its bytes.
pub const MESSAGE: u64 = 4 << 10;

/// Files that may be on their way to clients: each can be a descriptor, and has
/// a block or two in memory.
const FILES: usize = 256;
/// Work on disks that may be under way: each is a thread.
const DISK_WORK: usize = 16;

/// What is held for one tenant.
#[derive(Debug)]
pub struct Footprint {
    held: AtomicU64,
    limit: u64,
    files: Arc<Semaphore>,
    disk: Arc<Semaphore>,
    /// Charged for the work on disks.
    share: Option<Arc<Share>>,
    all: Arc<Together>,
}

impl Footprint {
    /// Nothing, of at most `limit` bytes.
    #[cfg(test)]
    pub fn new(limit: Option<u64>) -> Arc<Footprint> {
        Footprint::with(limit, FILES, None, &Together::new(u64::MAX))
    }

    /// Nothing, of at most `limit` bytes, for the tenant with this share of the
    /// processors. It is a part of what `all` hold.
    pub fn within(limit: Option<u64>, share: &Arc<Share>, all: &Arc<Together>) -> Arc<Footprint> {
        Footprint::with(limit, FILES, Some(Arc::clone(share)), all)
    }

    /// Nothing, of any number of bytes, and so many files.
    pub fn with_files(files: usize) -> Arc<Footprint> {
        Footprint::with(None, files, None, &Together::new(u64::MAX))
    }

    fn with(
        limit: Option<u64>,
        files: usize,
        share: Option<Arc<Share>>,
        all: &Arc<Together>,
    ) -> Arc<Footprint> {
        Arc::new(Footprint {
            held: AtomicU64::new(0),
            limit: limit.unwrap_or(u64::MAX),
            files: Arc::new(Semaphore::new(files)),
            disk: Arc::new(Semaphore::new(DISK_WORK)),
            share,
            all: Arc::clone(all),
        })
    }

    /// Whether the tenant's own limit leaves room for so many more bytes of an
    /// instance.
    pub fn has_room(&self, bytes: u64) -> bool {
        self.held().saturating_add(bytes) <= self.instances_limit()
    }

    /// Lines up for memory that others give back.
    pub fn line_up(self: &Arc<Self>) -> Place {
        let mut line = self.all.line();
        line.last += 1;
        let id = line.last;
        line.places.push(Standing { id, bytes: 0, enough: 0, is_first: false, told: None });
        Place { footprint: Arc::clone(self), id }
    }

    fn instances_limit(&self) -> u64 {
        self.limit - self.limit / 8
    }

    fn add(&self, bytes: u64) -> u64 {
        self.all.held.fetch_add(bytes, Ordering::Relaxed);
        self.held.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes)
    }

    fn take(&self, bytes: u64) {
        self.held.fetch_sub(bytes, Ordering::Relaxed);
        self.all.take(bytes);
    }

    /// Bytes that are held.
    pub fn held(&self) -> u64 {
        self.held.load(Ordering::Relaxed)
    }

    /// Counts `bytes` that are held in any case, for as long as the guard lives.
    pub fn hold(self: &Arc<Self>, bytes: u64) -> Held {
        self.add(bytes);
        Held { footprint: Arc::clone(self), bytes }
    }

    /// The same, if the tenant may have so many more.
    pub fn try_hold(self: &Arc<Self>, bytes: u64) -> Option<Held> {
        let mut held = self.hold(0);
        held.grow_within(bytes, self.limit).then_some(held)
    }

    /// A place for a file that is to be sent, if there is one.
    pub fn file_place(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.files).try_acquire_owned().ok()
    }

    /// The places for work on disks.
    pub fn disk_places(&self) -> &Arc<Semaphore> {
        &self.disk
    }

    /// Whom to charge for the processor time of that work.
    pub fn share(&self) -> Option<&Arc<Share>> {
        self.share.as_ref()
    }
}

/// A part of a tenant's footprint. Counted until it is dropped.
#[derive(Debug)]
pub struct Held {
    footprint: Arc<Footprint>,
    bytes: u64,
}

impl Held {
    /// Sets what is held.
    pub fn set(&mut self, bytes: u64) {
        match bytes.checked_sub(self.bytes) {
            Some(more) => drop(self.footprint.add(more)),
            None => self.footprint.take(self.bytes - bytes),
        }
        self.bytes = bytes;
    }

    /// What this is a part of.
    pub fn footprint(&self) -> &Arc<Footprint> {
        &self.footprint
    }

    /// Bytes that are held by this.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Adds `bytes` of an instance's memory, if the tenant may have so many more.
    pub fn grow(&mut self, bytes: u64) -> bool {
        self.grow_within(bytes, self.footprint.instances_limit())
    }

    /// Takes all but `left` bytes out of it.
    pub fn split_off(&mut self, left: u64) -> Held {
        let bytes = self.bytes.saturating_sub(left);
        self.bytes -= bytes;
        Held { footprint: Arc::clone(&self.footprint), bytes }
    }

    /// Ties this to `bytes`: they are held until the last part of them is gone,
    /// whoever has it.
    pub fn tie(self, bytes: impl AsRef<[u8]> + Send + 'static) -> Bytes {
        struct Tied<B>(B, #[expect(dead_code, reason = "for its drop")] Held);
        impl<B: AsRef<[u8]>> AsRef<[u8]> for Tied<B> {
            fn as_ref(&self) -> &[u8] {
                self.0.as_ref()
            }
        }
        Bytes::from_owner(Tied(bytes, self))
    }

    fn grow_within(&mut self, bytes: u64, limit: u64) -> bool {
        let held = self.footprint.add(bytes);
        if held > limit || !self.footprint.all.make_room(held) {
            self.footprint.take(bytes);
            return false;
        }
        self.bytes += bytes;
        true
    }

    /// Takes `bytes` away, of those that were added.
    pub fn shrink(&mut self, bytes: u64) {
        self.set(self.bytes.saturating_sub(bytes));
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.footprint.take(self.bytes);
    }
}

/// What a tenant may hold of the part that is kept for those who hold little:
/// a first instance of most apps.
const LITTLE: u64 = 32 << 20;

/// The memory that is held for all tenants together.
pub struct Together {
    held: AtomicU64,
    limit: u64,
    /// Gives back what somebody holds without need. False if there is nothing.
    relief: OnceLock<Box<dyn Fn() -> bool + Send + Sync>>,
    line: Mutex<Line>,
    /// With less than this held, there is enough for one who waits in line.
    wanted_below: AtomicU64,
    /// Whether one waits whose tenant has no instance.
    is_owed: AtomicBool,
}

/// Those who wait for memory to be given back.
#[derive(Default)]
struct Line {
    /// In order of arrival.
    places: Vec<Standing>,
    /// The last one's number.
    last: u64,
}

struct Standing {
    id: u64,
    /// What is wanted.
    bytes: u64,
    /// With so much held there is room for it.
    enough: u64,
    is_first: bool,
    /// None while it tries to get what it waited for.
    told: Option<oneshot::Sender<()>>,
}

/// A place in the line for memory, until dropped.
#[derive(Debug)]
pub struct Place {
    footprint: Arc<Footprint>,
    id: u64,
}

impl Place {
    /// Waits until there is room for `bytes` more of the tenant's, which it then
    /// tries to get. It stays in its place until that has come to something.
    ///
    /// If it `is_first`, the first instance of its pool, and little, it is told
    /// before all others.
    pub fn turn(&self, bytes: u64, is_first: bool) -> impl Future<Output = ()> + Send + use<> {
        let all = &self.footprint.all;
        let own = self.footprint.held().saturating_add(bytes);
        let (sender, told) = oneshot::channel();
        let mut line = all.line();
        if let Some(place) = line.places.iter_mut().find(|place| place.id == self.id) {
            let enough = all.limit_for(own).saturating_sub(bytes);
            let is_first = is_first && own <= LITTLE;
            *place = Standing { id: self.id, bytes, enough, is_first, told: Some(sender) };
        }
        all.tell(line);
        async {
            // The sender is dropped only with the place.
            let _ = told.await;
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let all = &self.footprint.all;
        let mut line = all.line();
        line.places.retain(|place| place.id != self.id);
        all.tell(line);
    }
}

impl Together {
    /// Nothing, of at most `limit` bytes.
    pub fn new(limit: u64) -> Arc<Together> {
        Arc::new(Together {
            held: AtomicU64::new(0),
            limit,
            relief: OnceLock::new(),
            line: Mutex::default(),
            wanted_below: AtomicU64::new(0),
            is_owed: AtomicBool::new(false),
        })
    }

    /// Has `relief` called when memory runs short. It is false when there is
    /// nothing to give back.
    pub fn relieve_by(&self, relief: impl Fn() -> bool + Send + Sync + 'static) {
        // There is one, set once.
        let _ = self.relief.set(Box::new(relief));
    }

    fn held(&self) -> u64 {
        self.held.load(Ordering::Relaxed)
    }

    /// Whether one waits for memory whose tenant has no instance and holds little.
    /// Then those who have an instance make no further one.
    pub fn is_owed(&self) -> bool {
        self.is_owed.load(Ordering::Relaxed)
    }

    fn take(&self, bytes: u64) {
        // Nobody who waits is missed, though most releases do not take the lock.
        // One who lines up first says what he wants, and then looks at what is
        // held by an operation that counts as a write, with `Release`. If that
        // comes after this one, it sees what is given back here. Else this one has
        // read what it wrote, or what was made of it, and sees what is wanted.
        let held = self.held.fetch_sub(bytes, Ordering::Acquire).saturating_sub(bytes);
        if held < self.wanted_below.load(Ordering::Relaxed) {
            self.tell(self.line());
        }
    }

    /// Tells those in line for whom there is enough, the first of them first.
    fn tell(&self, mut line: MutexGuard<'_, Line>) {
        loop {
            let is_owed = line.places.iter().any(|place| place.is_first && place.told.is_some());
            // What is there for those who were told and try to get it. They may
            // have some of it, and then it counts twice for a moment.
            let told = line.places.iter().filter(|place| place.told.is_none());
            let promised = told.map(|place| place.bytes).fold(0, u64::saturating_add);
            // The least that is too much for one.
            let below = |place: &Standing| {
                let waits = place.told.is_some() && (place.is_first || !is_owed);
                if waits { place.enough.saturating_add(1).saturating_sub(promised) } else { 0 }
            };
            let wanted_below = line.places.iter().map(below).max().unwrap_or(0);
            self.is_owed.store(is_owed, Ordering::Relaxed);
            self.wanted_below.store(wanted_below, Ordering::Relaxed);
            let held = self.held.fetch_add(0, Ordering::Release);
            let Some(next) = line.places.iter_mut().find(|place| held < below(place)) else { return };
            // One that does not listen at this moment will try in any case, or
            // give its place up.
            let _ = next.told.take().map(|told| told.send(()));
        }
    }

    fn line(&self) -> MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What all may hold when one who holds `own` wants more: an eighth is left
    /// for those that hold little, whatever the others do.
    fn limit_for(&self, own: u64) -> u64 {
        if own <= LITTLE { self.limit } else { self.limit - self.limit / 8 }
    }

    /// Whether no more is held than may be by one who holds `own`, if need be
    /// after some was given back.
    fn make_room(&self, own: u64) -> bool {
        while self.held() > self.limit_for(own) {
            if !self.relief.get().is_some_and(|relief| relief()) {
                return false;
            }
        }
        true
    }
}

impl fmt::Debug for Together {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {}", self.held(), self.limit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduler::Scheduler;

    const MIB: u64 = 1 << 20;

    #[test]
    fn together_tenants_hold_no_more_than_there_is() {
        let all = Together::new(8 * LITTLE);
        let share = Share::new(&Scheduler::new(None), 1, None);
        let (one, two) = (Footprint::within(None, &share, &all), Footprint::within(None, &share, &all));
        let (mut large, mut little) = (one.hold(0), two.hold(0));
        assert!(large.grow(7 * LITTLE) && !large.grow(1), "an eighth is left for others");
        assert!(one.has_room(1));
        assert!(little.grow(LITTLE) && !little.grow(1));
        assert_eq!(all.held(), 8 * LITTLE);
        // Somebody has something to spare, once.
        let spare = Mutex::new(Some(large));
        all.relieve_by(move || spare.lock().unwrap().take().is_some());
        assert!(little.grow(6 * LITTLE) && !little.grow(1));
        drop(little);
        assert_eq!((one.held(), two.held(), all.held()), (0, 0, 0));
    }

    /// Whether a wait for memory is over.
    fn is_over(turn: &mut (impl Future<Output = ()> + Unpin)) -> bool {
        std::pin::Pin::new(turn)
            .poll(&mut std::task::Context::from_waker(std::task::Waker::noop()))
            .is_ready()
    }

    #[test]
    fn memory_goes_to_those_without_an_instance_first_and_then_in_order() {
        let all = Together::new(80 * MIB);
        let share = Share::new(&Scheduler::new(None), 1, None);
        let [large, one, two, three] = [(); 4].map(|()| Footprint::within(None, &share, &all));
        let mut held = large.hold(78 * MIB);
        let places = [&large, &one, &two, &three].map(Footprint::line_up);
        let further = Box::pin(places[0].turn(MIB, false));
        let [mut further, mut first, mut second, mut little] = [
            further,
            Box::pin(places[1].turn(10 * MIB, true)),
            Box::pin(places[2].turn(10 * MIB, true)),
            Box::pin(places[3].turn(2 * MIB, true)),
        ];
        assert!(!is_over(&mut first) && all.is_owed());
        assert!(is_over(&mut little), "it is there, in the eighth that is kept");
        let [large_place, one_place, two_place, three_place] = places;
        drop(three_place);
        held.set(65 * MIB);
        assert!(is_over(&mut first) && !is_over(&mut second), "there is enough for one");
        // What the first one got counts in full, though it has not said so.
        let got = one.hold(10 * MIB);
        held.set(60 * MIB);
        assert!(!is_over(&mut second));
        drop(one_place);
        assert!(is_over(&mut second) && !is_over(&mut further));
        // It came to nothing, and waits again.
        let mut second = Box::pin(two_place.turn(20 * MIB, true));
        held.set(58 * MIB);
        assert!(!is_over(&mut second) && !is_over(&mut further) && all.is_owed());
        drop(two_place);
        assert!(is_over(&mut further) && !all.is_owed());
        drop((got, large_place));
        assert_eq!((all.line().places.len(), all.wanted_below.load(Ordering::Relaxed)), (0, 0));
    }

    #[test]
    fn nobody_who_waits_for_memory_is_missed() {
        let all = Together::new(MIB);
        let share = Share::new(&Scheduler::new(None), 1, None);
        let footprint = Footprint::within(None, &share, &all);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let (sender, given) = std::sync::mpsc::channel::<Held>();
        let dropper = std::thread::spawn(move || given.into_iter().for_each(drop));
        for _ in 0..20_000 {
            sender.send(footprint.hold(MIB)).unwrap();
            let place = footprint.line_up();
            let turn = place.turn(1, true);
            let limit = std::time::Duration::from_secs(30);
            runtime.block_on(async { tokio::time::timeout(limit, turn).await }).unwrap();
        }
        drop(sender);
        dropper.join().unwrap();
    }

    #[test]
    fn what_is_dropped_is_not_held() {
        let footprint = Footprint::new(Some(160));
        let mut one = footprint.hold(10);
        let mut two = footprint.hold(0);
        assert!(two.grow(130) && !two.grow(1));
        one.set(5);
        assert!(two.grow(5));
        two.shrink(50);
        assert_eq!(footprint.held(), 90);
        drop((one, two));
        assert_eq!(footprint.held(), 0);
    }

    #[test]
    fn instances_leave_room_for_what_is_on_its_way() {
        let footprint = Footprint::new(Some(80));
        let mut instances = footprint.hold(0);
        assert!(instances.grow(70) && !instances.grow(1));
        let on_its_way = footprint.try_hold(10).unwrap();
        assert!(footprint.try_hold(1).is_none());
        drop(on_its_way);
        assert_eq!(footprint.held(), 70);
    }

    #[test]
    fn bytes_are_held_until_their_last_part_is_gone() {
        let footprint = Footprint::new(None);
        let mut bytes = footprint.hold(4).tie(vec![1, 2, 3, 4]);
        let part = bytes.split_to(1);
        drop(bytes);
        assert_eq!((footprint.held(), &*part), (4, &[1][..]));
        drop(part);
        assert_eq!(footprint.held(), 0);
    }
}
