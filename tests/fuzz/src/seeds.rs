//! Inputs to begin with, made by the target that knows their form and put where `tests/fuzz/run` looks for
//! them.

use std::path::PathBuf;

/// Writes `seeds` to the folder that `OUTBOARD_FUZZ_SEEDS` names, when it does. For the `init` of a target.
pub fn offer(seeds: &[Vec<u8>]) {
    let Some(folder) = std::env::var_os("OUTBOARD_FUZZ_SEEDS").map(PathBuf::from) else { return };
    for (n, seed) in seeds.iter().enumerate() {
        std::fs::write(folder.join(format!("seed-{n}")), seed).expect("the folder of the seeds");
    }
}

/// Operations with room between them: zeros mean nothing more to do, and a good answer where one is due.
pub fn spaced(operations: &[u8]) -> Vec<u8> {
    operations.iter().flat_map(|op| std::iter::once(*op).chain([0; 64])).collect()
}
