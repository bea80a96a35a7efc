//! What the values of limits and numbers may be, wherever they are written: in a
//! configuration file or on the command line.

use std::ops::RangeInclusive;
use std::time::Duration;

use crate::units::{Size, Time};

/// Memory of an instance: none starts with less, and its addresses have 32 bits.
pub const MEMORY: RangeInclusive<Size> = Size(1 << 20)..=Size(4 << 30);
/// Memory of all instances of an app, or of all apps.
pub const TOTAL_MEMORY: RangeInclusive<Size> = Size(1 << 20)..=Size(u64::MAX);
/// Time for something that needs some.
pub const TIME: RangeInclusive<Time> = Time(Duration::from_millis(1))..=Time(Duration::MAX);
/// Instances of an app.
pub const INSTANCES: RangeInclusive<u16> = 1..=4096;
/// Requests after which an instance or a connection is replaced.
pub const REQUESTS: RangeInclusive<u64> = 1..=u64::MAX;
/// Requests in each second, and other numbers of which there has to be one.
pub const SOME: RangeInclusive<u32> = 1..=u32::MAX;
/// An app's share of the processors.
pub const WEIGHT: RangeInclusive<u32> = 1..=1000;
