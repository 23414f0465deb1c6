//! Which requests of a split ring were in flight when its backend died without leaving notes. Backends
//! finish out of order, so it is not simply those behind the used index. Pure; must answer only what the
//! two rings leave no doubt about.
//!
//! A head goes by turns from the driver to the backend (*made available*) and back (*used*). The order
//! within either ring is known, only how the two interleave is not: let `Y(p)` be how many heads were
//! used when position `p` of the available ring was written. It never falls, is at most `p`, and at
//! least `p` less the number of heads. Each head is either finished or not; each of the two says
//! between which values `Y` must lie at every position of that head, for the turns to come out even.
//! What contradicts the others is struck out until nothing is left in doubt (§2.7.6, §2.7.8).
//!
//! One thing no ring tells: a request that as many others overtook as the ring has entries has left no
//! trace in it. It is known only by its number, as there is one in flight more than can be found.

use std::collections::BTreeMap;
use std::ops::Range;

/// Both indexes of a ring at one time, the used one a little earlier.
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
    /// The rings as they stand in memory; as many entries in either as the queue has.
    pub(crate) now: &'a Contents,
    /// Both indexes at a time when nothing was in flight, or all that was in flight was noted in the
    /// available ring from there on. Older entries are of no interest.
    pub(crate) origin: u16,
    /// The rings when the backend was lost. What the driver made available since is not used, but may
    /// stand where something older did.
    pub(crate) cut: Option<&'a Contents>,
}

/// Entries that a search looks at before it gives up: it must not hold up others.
const EFFORT: usize = 1 << 20;

/// A position in either ring, counted on beyond 16 bits.
type Position = i64;

/// One head's turns.
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

/// What may have become of a head.
struct Possible {
    unfinished: bool,
    bounds: Vec<Bound>,
}

/// The parts of the rings that still hold what was written.
struct Window {
    available: Range<Position>,
    used: Range<Position>,
    /// Nothing was in flight where it begins.
    whole: bool,
}

impl Turns {
    /// The bounds under which the last turn is `unfinished`; `None` when that cannot be.
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
        // Used, and never made available.
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

    /// Everything is used that will be when position `from` is written.
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

    /// Carries the bounds on, as `Y` never falls. False when they contradict each other.
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
    /// The heads in flight, in the order in which they were made available; `None` when the rings leave
    /// that in doubt, or hold what cannot be.
    pub(crate) fn unfinished(&self) -> Option<Vec<u16>> {
        let size = self.size();
        if size == 0 || self.now.used.len() != self.now.available.len() {
            return None;
        }
        let (available, used) = self.ends();
        let oldest = self.cut().map_or(available, |(at, _)| at) - size;
        // A ring that went on for a multiple of 65536 since its origin looks as if it had just begun.
        self.since_origin(oldest).and_then(|window| self.search(&window)).or_else(|| {
            self.search(&Window { available: oldest..available, used: used - size..used, whole: false })
        })
    }

    /// Entries of either ring.
    fn size(&self) -> Position {
        Position::try_from(self.now.available.len()).unwrap_or(0)
    }

    /// Where the rings end.
    fn ends(&self) -> (Position, Position) {
        let Indexes { available, used } = self.now.indexes;
        // Far enough from zero for everything that is subtracted.
        let end = Position::from(available) + (1 << 20);
        (end, end - Position::from(available.wrapping_sub(used)))
    }

    /// Where the available ring ended when the backend was lost, and what it held, if nothing was used since.
    fn cut(&self) -> Option<(Position, &[u16])> {
        let cut = self.cut?;
        let since = Position::from(self.now.indexes.available.wrapping_sub(cut.indexes.available));
        let fits = cut.indexes.used == self.now.indexes.used
            && cut.available.len() == self.now.available.len()
            && since <= self.size();
        fits.then(|| (self.ends().0 - since, cut.available.as_slice()))
    }

    /// Everything since the origin, if that is still there.
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
            // Their number may say what the order does not.
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
