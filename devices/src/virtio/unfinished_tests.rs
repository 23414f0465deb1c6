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

/// A driver and a backend that may overtake, and the truth about what is in flight.
struct Rings {
    available: Vec<u16>,
    used: Vec<u32>,
    available_index: u16,
    used_index: u16,
    origin: u16,
    cut: Option<u16>,
    flight: Vec<u16>,
    free: Vec<u16>,
}

impl Rings {
    fn new(size: usize, heads: u16, origin: u16) -> Self {
        Self {
            available: vec![0; size],
            used: vec![0; size],
            available_index: origin,
            used_index: origin,
            origin,
            cut: None,
            flight: Vec::new(),
            free: (0..heads).collect(),
        }
    }

    fn submit(&mut self) {
        let Some(head) = self.free.pop() else { return };
        let size = self.available.len();
        self.available[usize::from(self.available_index) % size] = head;
        self.available_index = self.available_index.wrapping_add(1);
        self.flight.push(head);
    }

    fn finish(&mut self, nth: usize) {
        let head = self.flight.remove(nth);
        let size = self.used.len();
        self.used[usize::from(self.used_index) % size] = head.into();
        self.used_index = self.used_index.wrapping_add(1);
        self.free.push(head);
    }

    /// Work for a while, where each request is overtaken by `spread` later ones at most.
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

    fn history(&self) -> History<'_> {
        let Self { available, used, available_index, used_index, origin, .. } = self;
        let (available_index, used_index, origin) = (*available_index, *used_index, *origin);
        History { available, used, available_index, used_index, origin, cut: self.cut }
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

/// Batches of ten and more that qemu-storage-daemon finished from the last to the first, and then four
/// more that were made available when it had died.
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
    let (available, used) = (available.concat(), used.concat());
    let history = History {
        available: &available,
        available_index: 982,
        used: &used,
        used_index: 978,
        origin: 882,
        cut: None,
    };
    assert_eq!(history.unfinished(), None);
    assert_eq!(History { cut: Some(978), ..history }.unfinished(), Some(vec![24, 33, 45, 3]));
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
    let good = rings.history();
    assert!(good.unfinished().is_some());
    let cases = [
        History { used: &[7; 8], ..good },
        History { used: &[u32::MAX; 8], ..good },
        History { available: &[9; 8], ..good },
        History { available: &[3; 8], ..good },
        History { used: &[3; 4], ..good },
        History { available: &[], used: &[], ..good },
    ];
    for (nth, case) in cases.iter().enumerate() {
        assert_eq!(case.unfinished(), None, "case {nth}");
    }
}

/// Whatever stands in the rings, the search ends, soon.
#[test]
fn noise_is_searched_in_bounded_time() {
    let begin = std::time::Instant::now();
    for seed in 1..200 {
        let mut random = Random::new(seed);
        let size = [4, 64, 256, 1024][random.below(4)];
        let heads = 1 + random.below(size);
        let available: Vec<u16> = (0..size).map(|_| u16::try_from(random.below(heads)).unwrap()).collect();
        let used: Vec<u32> = (0..size).map(|_| u32::try_from(random.below(heads)).unwrap()).collect();
        let index = || u16::try_from(seed * 977 % 65536).unwrap();
        let lag = u16::try_from(random.below(size + 1)).unwrap();
        let history = History {
            available: &available,
            used: &used,
            available_index: index(),
            used_index: index().wrapping_sub(lag),
            origin: 0,
            cut: None,
        };
        if let Some(unfinished) = history.unfinished() {
            assert_eq!(unfinished.len(), usize::from(lag));
        }
    }
    assert!(begin.elapsed().as_secs() < 20, "{:?}", begin.elapsed());
}
