//! Virtio 1.2 §2.7.6, §2.7.8: finds the requests of a split ring that were in flight when the backend was
//! lost without an inflight area. Backends finish requests out of order, so these are not simply the requests
//! behind the used index. Pure; must answer only when the two rings leave no doubt.
//!
//! A head alternates between two events: the driver makes it *available*, and the backend makes it *used*.
//! The order of events within each ring is known. How the two orders interleave is unknown.
//!
//! Let `Y(p)` be the number of heads that were used when position `p` of the available ring was written. `Y`
//! never falls. `Y(p)` is at most `p`, and at least `p` minus the number of heads.
//!
//! The search assumes for each head once that it is finished and once that it is unfinished. Its two events
//! must alternate. So each assumption yields bounds for `Y` at every position of that head. An assumption
//! that contradicts the bounds of the other heads is struck out. This is repeated until no head is in doubt,
//! or nothing more can be struck out.
//!
//! One case leaves no trace: a request that was overtaken by as many requests as the ring has entries. Only
//! the count shows it, as one request more is in flight than the search finds.

use std::collections::BTreeMap;
use std::ops::Range;

/// Both indexes of a ring at one time. The used index is read first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Indexes {
    pub(crate) available: u16,
    pub(crate) used: u16,
}

/// A ring as it stood at one time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Contents {
    pub(crate) indexes: Indexes,
    /// The heads in the available ring.
    pub(crate) available: Vec<u16>,
    /// The ids in the used ring.
    pub(crate) used: Vec<u32>,
}

/// What is known of one queue.
#[derive(Debug, Clone, Copy)]
pub(crate) struct History<'a> {
    /// The rings as they are in memory now. Each has as many entries as the queue has.
    pub(crate) now: &'a Contents,
    /// The value of both indexes at an earlier time: either nothing was in flight then, or the available ring
    /// listed all requests in flight from this index on. Entries before this index do not matter.
    pub(crate) origin: u16,
    /// The rings when the backend was lost. Requests that the driver made available after that are certainly
    /// not used, but their entries may have overwritten older ones.
    pub(crate) cut: Option<&'a Contents>,
}

/// The most entries that a search reads before it gives up, as other threads must not be held up.
const EFFORT: usize = 1 << 20;

/// A position in either ring, counted on beyond 16 bits.
type Position = i64;

/// The positions at which one head was made available and used.
#[derive(Default)]
struct Turns {
    available: Vec<Position>,
    used: Vec<Position>,
}

/// `Y(at)` lies within `least..=most`.
struct Bound {
    at: Position,
    least: Position,
    most: Position,
}

/// One assumption about a head, finished or unfinished, and the bounds that follow.
struct Possible {
    unfinished: bool,
    bounds: Vec<Bound>,
}

/// The parts of the rings that are not overwritten yet.
struct Window {
    available: Range<Position>,
    used: Range<Position>,
    /// Nothing was in flight at the beginning of the window.
    whole: bool,
}

impl Turns {
    /// The bounds that follow when the head's last request is `unfinished`, or finished. `None` when the
    /// rings contradict the assumption.
    fn as_if(&self, unfinished: bool, window: &Window) -> Option<Possible> {
        let mut used = self.used.iter().rev().copied();
        let before = (!window.whole).then_some(window.used.start - 1);
        let mut most = match unfinished {
            true if self.available.is_empty() => return None,
            true => window.used.end,
            false if self.available.is_empty() && self.used.is_empty() => return None,
            false => used.next().or(before)?,
        };
        let mut bounds = Vec::with_capacity(self.available.len());
        let mut left = self.available.iter().rev().copied().peekable();
        while let Some(at) = left.next() {
            let earlier = used.next();
            let least = earlier.map_or(Position::MIN, |used| used + 1);
            if least > most {
                return None;
            }
            bounds.push(Bound { at, least, most });
            most = match earlier.or(before) {
                Some(used) => used,
                None if left.peek().is_some() => return None,
                None => most,
            };
        }
        // Heads that were used without having been made available in the window.
        let orphans = used.count();
        (orphans == 0 || !window.whole).then_some(Possible { unfinished, bounds })
    }
}

/// What is known of `Y` so far.
struct Envelope {
    first: Position,
    least: Vec<Position>,
    most: Vec<Position>,
}

impl Envelope {
    fn new(window: &Window, heads: usize) -> Option<Self> {
        let heads = Position::try_from(heads).ok()?;
        let positions = || window.available.clone();
        Some(Self {
            first: window.available.start,
            least: positions().map(|at| at - heads + 1).collect(),
            most: positions().map(|at| at.min(window.used.end)).collect(),
        })
    }

    fn index(&self, at: Position) -> usize {
        usize::try_from(at - self.first).unwrap_or(usize::MAX)
    }

    /// Nothing was used after position `from` was written: `used` is the final count there.
    fn cut(&mut self, from: Position, used: Position) {
        let first = self.index(from);
        for least in self.least.iter_mut().skip(first) {
            *least = used;
        }
    }

    fn allows(&self, possible: &Possible) -> bool {
        possible.bounds.iter().all(|bound| {
            let index = self.index(bound.at);
            let least = self.least.get(index).is_some_and(|least| *least <= bound.most);
            least && self.most.get(index).is_some_and(|most| *most >= bound.least)
        })
    }

    fn narrow(&mut self, possible: &Possible) {
        for bound in &possible.bounds {
            let index = self.index(bound.at);
            if let Some(least) = self.least.get_mut(index) {
                *least = bound.least.max(*least);
            }
            if let Some(most) = self.most.get_mut(index) {
                *most = bound.most.min(*most);
            }
        }
    }

    /// Extends the bounds to neighbouring positions, as `Y` never falls. False when the bounds contradict
    /// each other.
    fn spread(&mut self) -> bool {
        let mut highest = Position::MIN;
        for least in &mut self.least {
            highest = highest.max(*least);
            *least = highest;
        }
        let mut lowest = Position::MAX;
        for most in self.most.iter_mut().rev() {
            lowest = lowest.min(*most);
            *most = lowest;
        }
        self.least.iter().zip(&self.most).all(|(least, most)| least <= most)
    }
}

impl History<'_> {
    /// The heads in flight, in the order in which they were made available. `None` when the rings leave a
    /// doubt or are inconsistent.
    pub(crate) fn unfinished(&self) -> Option<Vec<u16>> {
        let size = self.size();
        if size == 0 || self.now.used.len() != self.now.available.len() {
            return None;
        }
        let (available, used) = self.ends();
        let oldest = self.cut().map_or(available, |(at, _)| at) - size;
        // When a ring has advanced by a multiple of 65536 since its origin, it looks as if it had just begun.
        // So an inconclusive search from the origin is repeated with the entries that are left.
        self.since_origin(oldest).and_then(|window| self.search(&window)).or_else(|| {
            self.search(&Window { available: oldest..available, used: used - size..used, whole: false })
        })
    }

    /// The number of entries in each ring.
    fn size(&self) -> Position {
        Position::try_from(self.now.available.len()).unwrap_or(0)
    }

    /// The end of both rings, as positions.
    fn ends(&self) -> (Position, Position) {
        let Indexes { available, used } = self.now.indexes;
        // Far enough from zero for everything that is subtracted.
        let end = Position::from(available) + (1 << 20);
        (end, end - Position::from(available.wrapping_sub(used)))
    }

    /// The end of the available ring when the backend was lost, and the entries it had then. `None` when
    /// anything was used after that.
    fn cut(&self) -> Option<(Position, &[u16])> {
        let cut = self.cut?;
        let since = Position::from(self.now.indexes.available.wrapping_sub(cut.indexes.available));
        let fits = cut.indexes.used == self.now.indexes.used
            && cut.available.len() == self.now.available.len()
            && since <= self.size();
        fits.then(|| (self.ends().0 - since, cut.available.as_slice()))
    }

    /// The window from the origin on; `None` when a part of it is overwritten.
    fn since_origin(&self, oldest: Position) -> Option<Window> {
        let (available, used) = self.ends();
        let origin = available - Position::from(self.now.indexes.available.wrapping_sub(self.origin));
        let there = oldest <= origin && used - self.size() <= origin && origin <= used;
        there.then_some(Window { available: origin..available, used: origin..used, whole: true })
    }

    fn search(&self, window: &Window) -> Option<Vec<u16>> {
        let heads = self.turns(window)?;
        let due = usize::try_from(window.available.end - window.used.end).ok()?;
        let mut envelope = Envelope::new(window, heads.len())?;
        if let Some((at, _)) = self.cut() {
            envelope.cut(window.available.start.max(at), window.used.end);
        }
        let mut fate: BTreeMap<u16, bool> = BTreeMap::new();
        let mut open: BTreeMap<u16, Vec<Possible>> = heads
            .iter()
            .map(|(head, turns)| {
                let both = [true, false].into_iter();
                (*head, both.filter_map(|unfinished| turns.as_if(unfinished, window)).collect())
            })
            .collect();
        let rounds = EFFORT.checked_div(self.now.available.len()).unwrap_or(0);
        for _ in 0..rounds {
            if !envelope.spread() {
                return None;
            }
            let before = fate.len();
            let mut struck = false;
            for (head, possible) in &mut open {
                let were = possible.len();
                possible.retain(|possible| envelope.allows(possible));
                struck |= possible.len() < were;
                match possible.as_slice() {
                    [] => return None,
                    [only] => {
                        envelope.narrow(only);
                        fate.insert(*head, only.unfinished);
                    }
                    _ => {}
                }
            }
            open.retain(|head, _| !fate.contains_key(head));
            let unfinished = fate.values().filter(|unfinished| **unfinished).count();
            let missing = due.checked_sub(unfinished)?;
            if open.is_empty() {
                return (missing == 0).then(|| in_order(&heads, &fate));
            }
            if fate.len() > before || struck {
                continue;
            }
            // The count may decide where the order does not.
            if missing == 0 || missing == open.len() {
                for possible in open.values_mut() {
                    possible.retain(|possible| possible.unfinished == (missing != 0));
                }
                continue;
            }
            return None;
        }
        None
    }

    fn turns(&self, window: &Window) -> Option<BTreeMap<u16, Turns>> {
        let (size, cut) = (self.size(), self.cut());
        let slot = |at: Position| usize::try_from(at.checked_rem_euclid(size)?).ok();
        let mut heads: BTreeMap<u16, Turns> = BTreeMap::new();
        for at in window.available.clone() {
            let ring = match cut {
                Some((end, then)) if at < end => then,
                _ => &self.now.available,
            };
            let head = *ring.get(slot(at)?)?;
            heads.entry(head).or_default().available.push(at);
        }
        for at in window.used.clone() {
            let head = u16::try_from(*self.now.used.get(slot(at)?)?).ok()?;
            heads.entry(head).or_default().used.push(at);
        }
        heads.keys().all(|head| usize::from(*head) < self.now.available.len()).then_some(heads)
    }
}

fn in_order(heads: &BTreeMap<u16, Turns>, fate: &BTreeMap<u16, bool>) -> Vec<u16> {
    let unfinished = heads.iter().filter(|(head, _)| fate.get(head) == Some(&true));
    let mut places: Vec<_> = unfinished.map(|(head, turns)| (turns.available.last(), *head)).collect();
    places.sort_unstable();
    places.into_iter().map(|(_, head)| head).collect()
}

#[cfg(test)]
#[path = "in_flight_tests.rs"]
mod tests;
