use super::*;

struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    fn below(&mut self, below: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 33).unwrap() % below
    }
}

/// A driver, a backend that may finish requests out of order, and the true list of requests in flight.
struct Rings {
    now: Contents,
    origin: u16,
    cut: Option<Contents>,
    flight: Vec<u16>,
    free: Vec<u16>,
}

impl Rings {
    fn new(size: usize, heads: u16, origin: u16) -> Self {
        let indexes = Indexes { available: origin, used: origin };
        Self {
            now: Contents { indexes, available: vec![0; size], used: vec![0; size] },
            origin,
            cut: None,
            flight: Vec::new(),
            free: (0..heads).collect(),
        }
    }

    fn submit(&mut self) {
        let Some(head) = self.free.pop() else { return };
        let Contents { indexes, available, .. } = &mut self.now;
        let size = available.len();
        available[usize::from(indexes.available) % size] = head;
        indexes.available = indexes.available.wrapping_add(1);
        self.flight.push(head);
    }

    fn finish(&mut self, nth: usize) {
        let head = self.flight.remove(nth);
        let Contents { indexes, used, .. } = &mut self.now;
        let size = used.len();
        used[usize::from(indexes.used) % size] = head.into();
        indexes.used = indexes.used.wrapping_add(1);
        self.free.push(head);
    }

    fn die(&mut self) {
        self.cut = Some(self.now.clone());
    }

    /// Works for a while; each request is overtaken by at most `spread` later ones.
    fn work(&mut self, random: &mut Random, requests: usize, spread: usize) {
        for _ in 0..requests {
            (0..random.below(3)).for_each(|_| self.submit());
            for _ in 0..random.below(3) {
                if !self.flight.is_empty() {
                    let nth = random.below(spread.min(self.flight.len()));
                    self.finish(nth);
                }
            }
        }
    }

    /// Whether the entry that made this head available is still in the ring.
    fn shows(&self, head: u16) -> bool {
        self.now.available.contains(&head)
    }

    fn history(&self) -> History<'_> {
        History { now: &self.now, origin: self.origin, cut: self.cut.as_ref() }
    }
}

#[test]
fn answers_are_never_wrong_and_seldom_missing() {
    let (mut answered, mut asked) = (0, 0);
    for seed in 1..2000 {
        let mut random = Random::new(seed);
        let size = [32, 64, 256][random.below(3)];
        let heads = u16::try_from(1 + random.below(size / 3)).unwrap();
        let origin = [0, 65530, 7][random.below(3)];
        let mut rings = Rings::new(size, heads, origin);
        let (requests, spread) = (random.below(4 * size), 1 + random.below(6));
        rings.work(&mut random, requests, spread);
        asked += 1;
        if let Some(unfinished) = rings.history().unfinished() {
            answered += 1;
            assert_eq!(unfinished, rings.flight, "seed {seed}");
        }
    }
    assert!(answered * 100 >= asked * 97, "{answered} of {asked}");
}

#[test]
fn requests_that_finish_in_order_are_always_told() {
    for seed in 1..500 {
        let mut random = Random::new(seed);
        let size = [1, 2, 16, 256][random.below(4)];
        let heads = u16::try_from(1 + random.below(size)).unwrap();
        let mut rings = Rings::new(size, heads, 0);
        let requests = random.below(5 * size);
        rings.work(&mut random, requests, 1);
        assert_eq!(rings.history().unfinished(), Some(rings.flight.clone()), "seed {seed}");
    }
}

#[test]
fn one_that_was_overtaken_is_found() {
    let mut rings = Rings::new(8, 4, 0);
    (0..3).for_each(|_| rings.submit());
    rings.finish(1);
    assert_eq!(rings.history().unfinished(), Some(vec![3, 1]));
    rings.finish(1);
    rings.submit();
    assert_eq!(rings.history().unfinished(), Some(vec![3, 1]));
}

/// Batches of ten and more requests that qemu-storage-daemon finished from the last to the first. After its
/// death, the driver made four more available.
#[test]
fn what_was_made_available_after_the_backend_died_settles_what_else_was_in_doubt() {
    let available = [
        &[3, 48, 57, 39, 36, 30, 21, 0, 18, 12, 27, 6, 54, 15, 42, 9, 51, 24][..],
        &[24, 33, 45, 3, 39, 36, 30, 21, 0, 18, 12],
        &[24; 33],
        &[33, 45],
    ];
    let used = [
        &[15, 54, 6, 27, 12, 18, 0, 21, 30, 36, 39, 57, 48, 3, 45, 33, 24, 24][..],
        &[0, 21, 30, 36, 39, 57, 48, 3, 45, 33],
        &[24; 33],
        &[51, 9, 42],
    ];
    let now = Contents {
        indexes: Indexes { available: 982, used: 978 },
        available: available.concat(),
        used: used.concat(),
    };
    let history = History { now: &now, origin: 882, cut: None };
    assert_eq!(history.unfinished(), None);
    let cut = Contents { indexes: Indexes { available: 978, used: 978 }, ..now.clone() };
    assert_eq!(History { cut: Some(&cut), ..history }.unfinished(), Some(vec![24, 33, 45, 3]));
}

/// A driver that keeps as many requests in flight as it has heads, in batches, and a backend that finishes
/// them in any order. When the backend is lost there may be a doubt. The doubt ends when the driver has
/// handled its interrupt.
#[test]
fn driver_that_refills_its_ring_leaves_no_doubt() {
    let mut doubts = 0;
    for seed in 1..4000 {
        let mut random = Random::new(seed);
        let size = [16, 64, 256][random.below(3)];
        let depth = 2 + random.below(size / 2);
        let mut rings = Rings::new(size, u16::try_from(depth).unwrap(), [0, 65000][random.below(2)]);
        for _ in 0..size {
            (0..random.below(depth + 1)).for_each(|_| rings.submit());
            for _ in 0..random.below(depth + 1) {
                if !rings.flight.is_empty() {
                    rings.finish(random.below(rings.flight.len()));
                }
            }
        }
        rings.die();
        let told = rings.history().unfinished();
        doubts += usize::from(told.is_none());
        if rings.flight.iter().any(|head| !rings.shows(*head)) {
            // This request was overtaken by as many others as the ring has entries.
            continue;
        }
        assert!(told.is_none_or(|told| told == rings.flight), "seed {seed}");
        (0..depth).for_each(|_| rings.submit());
        assert_eq!(rings.history().unfinished(), Some(rings.flight.clone()), "seed {seed}");
    }
    assert!(doubts > 100, "too easy a riddle: {doubts}");
}

#[test]
fn idle_and_full_rings_are_no_riddle() {
    assert_eq!(Rings::new(8, 4, 3).history().unfinished(), Some(vec![]));
    let mut rings = Rings::new(8, 8, 65533);
    (0..8).for_each(|_| rings.submit());
    assert_eq!(rings.history().unfinished(), Some((0..8).rev().collect()));
}

#[test]
fn nonsense_has_no_answer() {
    let mut rings = Rings::new(8, 4, 0);
    (0..3).for_each(|_| rings.submit());
    rings.finish(0);
    let good = rings.now;
    let unfinished = |now: &Contents| History { now, origin: 0, cut: None }.unfinished();
    assert!(unfinished(&good).is_some());
    let cases = [
        Contents { used: vec![7; 8], ..good.clone() },
        Contents { used: vec![u32::MAX; 8], ..good.clone() },
        Contents { available: vec![9; 8], ..good.clone() },
        Contents { available: vec![3; 8], ..good.clone() },
        Contents { used: vec![3; 4], ..good.clone() },
        Contents { available: vec![], used: vec![], ..good },
    ];
    for (nth, case) in cases.iter().enumerate() {
        assert_eq!(unfinished(case), None, "case {nth}");
    }
}

/// Any contents of the rings let the search end soon.
#[test]
fn noise_is_searched_in_bounded_time() {
    let begin = std::time::Instant::now();
    for seed in 1..200 {
        let mut random = Random::new(seed);
        let size = [4, 64, 256, 1024][random.below(4)];
        let heads = 1 + random.below(size);
        let ring = |random: &mut Random| -> Vec<u16> {
            (0..size).map(|_| u16::try_from(random.below(heads)).unwrap()).collect()
        };
        let contents = |random: &mut Random| {
            let lag = u16::try_from(random.below(size + 1)).unwrap();
            let available = u16::try_from(seed * 977 % 65536).unwrap();
            let indexes = Indexes { available, used: available.wrapping_sub(lag) };
            let used = ring(random).into_iter().map(u32::from).collect();
            Contents { indexes, available: ring(random), used }
        };
        let now = contents(&mut random);
        let mut cut = contents(&mut random);
        cut.indexes.used = now.indexes.used;
        let cut = (random.below(2) == 0).then_some(&cut);
        let lag = now.indexes.available.wrapping_sub(now.indexes.used);
        if let Some(unfinished) = (History { now: &now, origin: 0, cut }).unfinished() {
            assert_eq!(unfinished.len(), usize::from(lag));
        }
    }
    assert!(begin.elapsed().as_secs() < 20, "{:?}", begin.elapsed());
}
