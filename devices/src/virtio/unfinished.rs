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

use std::collections::BTreeMap;
use std::ops::Range;

/// The rings of one queue as they stand in memory, and their indexes.
#[derive(Debug, Clone, Copy)]
pub(super) struct History<'a> {
    /// `avail.ring`; its length is the size of the queue.
    pub(super) available: &'a [u16],
    /// `avail.idx`
    pub(super) available_index: u16,
    /// The ids in `used.ring`.
    pub(super) used: &'a [u32],
    /// `used.idx`
    pub(super) used_index: u16,
    /// Both indexes at a time when nothing was in flight, or all that was in flight was noted in the
    /// available ring from there on. Older entries are of no interest.
    pub(super) origin: u16,
    /// `avail.idx` at a time when all that is used was used.
    pub(super) cut: Option<u16>,
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
    pub(super) fn unfinished(&self) -> Option<Vec<u16>> {
        let size = self.available.len();
        if size == 0 || self.used.len() != size {
            return None;
        }
        // A ring that went on for a multiple of 65536 since its origin looks as if it had just begun.
        self.since_origin(size).and_then(|window| self.search(&window)).or_else(|| {
            let size = Position::try_from(size).ok()?;
            let (available, used) = self.ends();
            let window =
                Window { available: available - size..available, used: used - size..used, whole: false };
            self.search(&window)
        })
    }

    /// Where the rings end.
    fn ends(&self) -> (Position, Position) {
        // Far enough from zero for everything that is subtracted.
        let available = Position::from(self.available_index) + (1 << 20);
        (available, available - Position::from(self.available_index.wrapping_sub(self.used_index)))
    }

    /// Everything since the origin, if that is still there.
    fn since_origin(&self, size: usize) -> Option<Window> {
        let length = self.available_index.wrapping_sub(self.origin);
        if usize::from(length) > size {
            return None;
        }
        let (available, used) = self.ends();
        let origin = available - Position::from(length);
        (origin <= used).then_some(Window { available: origin..available, used: origin..used, whole: true })
    }

    fn search(&self, window: &Window) -> Option<Vec<u16>> {
        let heads = self.turns(window)?;
        let due = usize::try_from(window.available.end - window.used.end).ok()?;
        let mut envelope = Envelope::new(window, heads.len())?;
        if let Some(cut) = self.cut {
            let since = Position::from(self.available_index.wrapping_sub(cut));
            envelope.cut(window.available.start.max(window.available.end - since), window.used.end);
        }
        let mut fate: BTreeMap<u16, bool> = BTreeMap::new();
        let mut open: BTreeMap<u16, Vec<Possible>> = heads
            .iter()
            .map(|(head, turns)| {
                let both = [true, false].into_iter();
                (*head, both.filter_map(|unfinished| turns.as_if(unfinished, window)).collect())
            })
            .collect();
        let most = Position::try_from(self.available.len()).ok()? / 4 * 3;
        let overtaken = window.available.end - most;
        let rounds = EFFORT.checked_div(self.available.len()).unwrap_or(0);
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
            // Where the rings begin, a head that was used just before looks like one that nearly all the
            // others overtook.
            let mut rare = false;
            for (head, possible) in &mut open {
                let made = heads.get(head).and_then(|turns| turns.available.last());
                if made.is_some_and(|made| *made < overtaken) {
                    rare |= possible.iter().any(|possible| possible.unfinished);
                    possible.retain(|possible| !possible.unfinished);
                }
            }
            if !rare {
                return None;
            }
        }
        None
    }

    fn turns(&self, window: &Window) -> Option<BTreeMap<u16, Turns>> {
        let size = Position::try_from(self.available.len()).ok()?;
        let slot = |at: Position| usize::try_from(at.rem_euclid(size)).ok();
        let mut heads: BTreeMap<u16, Turns> = BTreeMap::new();
        for at in window.available.clone() {
            let head = *self.available.get(slot(at)?)?;
            heads.entry(head).or_default().available.push(at);
        }
        for at in window.used.clone() {
            let head = u16::try_from(*self.used.get(slot(at)?)?).ok()?;
            heads.entry(head).or_default().used.push(at);
        }
        heads.keys().all(|head| usize::from(*head) < self.available.len()).then_some(heads)
    }
}

fn in_order(heads: &BTreeMap<u16, Turns>, fate: &BTreeMap<u16, bool>) -> Vec<u16> {
    let unfinished = heads.iter().filter(|(head, _)| fate.get(head) == Some(&true));
    let mut places: Vec<_> = unfinished.map(|(head, turns)| (turns.available.last(), *head)).collect();
    places.sort_unstable();
    places.into_iter().map(|(_, head)| head).collect()
}

#[cfg(test)]
#[path = "unfinished_tests.rs"]
mod tests;
