use super::*;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vm_memory::{Bytes, VolatileMemory};

/// A file of so many pages of ones, and a mapping of it.
fn file(pages: u64) -> (OwnedFd, Mapping) {
    let fd = memfd_create("image", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&fd, pages * 4096).unwrap();
    let mapping = Mapping::shared(&fd, 0, pages * 4096).unwrap();
    mapping.region().as_volatile_slice().write_slice(&vec![1; mapping.region().size()], 0).unwrap();
    (fd, mapping)
}

fn sum(mapping: &Mapping) -> u64 {
    let mut bytes = vec![0; mapping.region().size()];
    mapping.region().as_volatile_slice().read_slice(&mut bytes, 0).unwrap();
    bytes.iter().map(|byte| u64::from(*byte)).sum()
}

#[test]
fn a_file_that_gets_shorter_while_it_is_looked_at_is_an_error_and_no_signal() {
    let (fd, mapping) = file(64);
    assert_eq!(mind_shorter_files(|| sum(&mapping)), Ok(64 * 4096));
    let looked = mind_shorter_files(|| {
        ftruncate(&fd, 3 * 4096).unwrap();
        sum(&mapping)
    });
    assert_eq!(looked, Err(Shorter));
    // Another one is not blamed for it.
    let (_fd, other) = file(8);
    assert_eq!(mind_shorter_files(|| sum(&other)), Ok(8 * 4096));
}

#[test]
fn bus_errors_of_others_are_not_hidden() {
    // The one that dies is a process of its own.
    let me = std::env::current_exe().unwrap();
    let test = "host::memory::tests::a_bus_error_of_another_thread";
    let run = std::process::Command::new(me).args(["--exact", "--ignored", test]).output().unwrap();
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&run.status), Some(SIGBUS), "{run:?}");
}

#[test]
#[ignore = "dies: run by bus_errors_of_others_are_not_hidden in a process of its own"]
fn a_bus_error_of_another_thread() {
    let (fd, mapping) = file(2);
    ftruncate(&fd, 0).unwrap();
    let looked = mind_shorter_files(|| std::thread::scope(|scope| scope.spawn(|| sum(&mapping)).join()));
    panic!("it lives: {:?}", looked.map(|joined| joined.is_ok()));
}
