//! Against a server that we did not write: the `Server` of the rust-vmm crate `vfio_user`. Its device is memory in
//! region 0, mappable in part, and six vectors of MSI-X.

#![cfg(test)]

mod support;

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use support::{GuestMemory, Scratch};
use transport::memory::GuestAddr;
use transport::peer::{Cause, Limits};
use transport::vfio_user::{Client, DmaRights, IrqIndex, RegionIndex, Served, Sharing, SmallWrite};
use vfio_bindings::bindings::vfio::{
    VFIO_REGION_INFO_FLAG_MMAP, VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE, vfio_region_info,
    vfio_region_sparse_mmap_area,
};
use vfio_user::{DmaMapFlags, DmaUnmapFlags, IrqInfo, Server, ServerBackend, ServerRegion, SparseArea};

const BAR: RegionIndex = RegionIndex(0);

#[derive(Default)]
struct State {
    memory: Vec<u8>,
    maps: Vec<(u64, u64, Option<File>)>,
    vectors: Vec<File>,
    resets: u32,
}

/// Refuses what touches its last byte.
struct Device(Arc<Mutex<State>>);

impl ServerBackend for Device {
    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let at = usize::try_from(offset).unwrap();
        if region != 0 {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let state = self.0.lock().unwrap();
        data.copy_from_slice(state.memory.get(at..at + data.len()).ok_or(io::ErrorKind::InvalidInput)?);
        Ok(())
    }

    fn region_write(&mut self, _region: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        let at = usize::try_from(offset).unwrap();
        let mut state = self.0.lock().unwrap();
        state.memory.get_mut(at..at + data.len()).ok_or(io::ErrorKind::InvalidInput)?.copy_from_slice(data);
        Ok(())
    }

    fn dma_map(
        &mut self,
        flags: DmaMapFlags,
        _offset: u64,
        address: u64,
        size: u64,
        fd: Option<File>,
    ) -> io::Result<()> {
        assert_eq!(flags, DmaMapFlags::READ_WRITE);
        self.0.lock().unwrap().maps.push((address, size, fd));
        Ok(())
    }

    fn dma_unmap(&mut self, _flags: DmaUnmapFlags, address: u64, size: u64) -> io::Result<()> {
        let maps = &mut self.0.lock().unwrap().maps;
        let at = maps.iter().position(|map| (map.0, map.1) == (address, size));
        maps.remove(at.ok_or(io::ErrorKind::NotFound)?);
        Ok(())
    }

    fn reset(&mut self) -> io::Result<()> {
        self.0.lock().unwrap().resets += 1;
        Ok(())
    }

    fn set_irqs(&mut self, index: u32, flags: u32, start: u32, count: u32, fds: Vec<File>) -> io::Result<()> {
        let state = &mut self.0.lock().unwrap();
        match (index, flags, start, count) {
            (2, 33, 0, 0) => state.vectors.clear(),
            (2, 36, start, count) if state.vectors.len() == start as usize => {
                assert_eq!(fds.len(), count as usize);
                state.vectors.extend(fds);
            }
            _ => return Err(io::ErrorKind::InvalidInput.into()),
        }
        Ok(())
    }
}

struct Running {
    state: Arc<Mutex<State>>,
    path: PathBuf,
    server: Option<JoinHandle<()>>,
    _scratch: Scratch,
}

fn start() -> Running {
    let scratch = Scratch::new();
    let path = scratch.path("s");
    let state = Arc::new(Mutex::new(State { memory: vec![0; 0x3000], ..State::default() }));
    let bar: OwnedFd = rustix::fs::memfd_create("bar", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&bar, 0x3000).unwrap();
    let both = VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE;
    let region = |index, size| ServerRegion {
        region_info: vfio_region_info { argsz: 32, flags: both, index, size, ..Default::default() },
        sparse_areas: Vec::new(),
        mmap_fd: None,
    };
    let area = vfio_region_sparse_mmap_area { offset: 0x1000, size: 0x2000 };
    let mut regions: Vec<ServerRegion> =
        (0..9).map(|index| region(index, if index == 7 { 256 } else { 0 })).collect();
    regions[0] = ServerRegion {
        sparse_areas: vec![SparseArea { area }],
        mmap_fd: Some(bar.as_raw_fd()),
        ..region(0, 0x3000)
    };
    regions[0].region_info.flags |= VFIO_REGION_INFO_FLAG_MMAP;
    let irqs = (0..5).map(|index| IrqInfo { index, flags: 1, count: if index == 2 { 6 } else { 0 } });
    let server = Server::new(&path, true, irqs.collect(), regions).unwrap();
    let mut device = Device(Arc::clone(&state));
    let server = std::thread::spawn(move || {
        let _bar = bar;
        // An error is how a connection ends that we shut down.
        let _ended = server.run(&mut device);
    });
    Running { state, path, server: Some(server), _scratch: scratch }
}

impl Running {
    fn client(&self) -> Client {
        Client::connect(&self.path, &Limits::new(Duration::from_secs(5))).unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.server.take().unwrap().join().unwrap();
    }
}

#[test]
fn a_device_is_found_mapped_armed_driven_and_reset() {
    let running = start();
    let client = running.client();
    assert_eq!(client.version().server, (0, 0));
    assert_eq!(client.version().agreed.max_msg_fds, 1);
    assert!(!client.version().agreed.twin_socket);

    let info = client.device_info().unwrap();
    assert!(info.is_pci() && info.can_reset());
    assert_eq!((info.regions, info.irqs), (9, 5));
    let bar = client.region_info(BAR).unwrap();
    assert_eq!(bar.size, 0x3000);
    assert_eq!(bar.areas.iter().map(|area| (area.offset, area.size)).collect::<Vec<_>>(), [(0x1000, 0x2000)]);
    assert!(bar.fd.is_some());
    let config = client.region_info(RegionIndex::CONFIG).unwrap();
    assert!(config.size == 256 && config.areas.is_empty() && config.fd.is_none());
    assert_eq!(client.irq_info(IrqIndex::MSIX).unwrap().count, 6);
    let refused = client.region_io_fds(&bar).unwrap_err();
    assert!(matches!(refused.cause(), Cause::NotNegotiated), "{refused}");
    assert!(!refused.is_fatal());

    let memory = GuestMemory::new(4 << 20);
    client.dma_map_all(&memory.map, Sharing::Descriptor).unwrap();
    assert_eq!(running.state.lock().unwrap().maps.len(), 1);
    let again = client.dma_map(&memory.map.regions()[0], DmaRights::ReadWrite, Sharing::Descriptor);
    assert!(matches!(again.unwrap_err().cause(), Cause::Invalid(_)));

    let events: Vec<OwnedFd> =
        (0..6).map(|_| eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap()).collect();
    let fds: Vec<_> = events.iter().map(AsFd::as_fd).collect();
    client.disable_irqs(IrqIndex::MSIX).unwrap();
    client.arm_irqs(IrqIndex::MSIX, &fds).unwrap();
    assert_eq!(running.state.lock().unwrap().vectors.len(), 6, "six messages of one fd each");
    running.state.lock().unwrap().vectors[4].write_all(&1u64.to_ne_bytes()).unwrap();
    assert_eq!(rustix::io::read(&events[4], &mut [0; 8]).unwrap(), 8);
    assert!(client.arm_irqs(IrqIndex::MSI, &fds).is_err(), "it has none");

    client.write(BAR, 0x10, &[1, 2, 3, 4]).unwrap();
    let mut data = [0; 4];
    client.read(BAR, 0x10, &mut data).unwrap();
    assert_eq!(data, [1, 2, 3, 4]);
    for n in 0..2000u32 {
        client.post_write(BAR, u64::from(n % 512) * 4, &n.to_le_bytes()).unwrap();
    }
    client.read(BAR, (1999 % 512) * 4, &mut data).unwrap();
    assert_eq!(data, 1999u32.to_le_bytes(), "posted writes come before what follows");
    let beyond = client.read(BAR, 0x2ffe, &mut data).unwrap_err();
    assert!(matches!(beyond.cause(), Cause::Refused(_)) && !beyond.is_fatal(), "{beyond}");
    let small = SmallWrite::new(BAR, 0, &[1]).unwrap();
    assert!(matches!(client.write_multi(&[small]).unwrap_err().cause(), Cause::NotNegotiated));

    client.reset().unwrap();
    assert_eq!(running.state.lock().unwrap().resets, 1);
    client.disable_irqs(IrqIndex::MSIX).unwrap();
    client.dma_unmap_all().unwrap();
    assert!(running.state.lock().unwrap().maps.is_empty());
    let twice = client.dma_unmap(GuestAddr(0), 4 << 20).unwrap_err();
    assert!(!twice.is_fatal(), "{twice}");
    assert_eq!(client.stats().exchanges.failures, 0);
}

#[test]
fn many_threads_share_a_connection_with_and_without_a_receiver() {
    let running = start();
    let client = running.client();
    for with_receiver in [false, true] {
        let receiver = with_receiver.then(|| client.receiver().unwrap());
        let polling = receiver.map(|mut receiver| {
            std::thread::spawn(move || {
                loop {
                    let mut fds = [rustix::event::PollFd::new(&receiver, rustix::event::PollFlags::IN)];
                    rustix::event::poll(&mut fds, None).unwrap();
                    match receiver.serve() {
                        Ok(Served::Messages(_)) => {}
                        Ok(Served::HungUp) | Err(_) => return,
                    }
                }
            })
        });
        std::thread::scope(|scope| {
            for thread in 0..4u64 {
                let client = client.clone();
                scope.spawn(move || {
                    for n in 0..500u64 {
                        let at = 0x100 * thread + n % 16 * 8;
                        client.post_write(BAR, at, &(n << 8 | thread).to_le_bytes()).unwrap();
                        let mut data = [0; 8];
                        client.read(BAR, at, &mut data).unwrap();
                        assert_eq!(u64::from_le_bytes(data), n << 8 | thread);
                    }
                });
            }
        });
        if let Some(thread) = polling {
            client.shut_down();
            thread.join().unwrap();
        }
    }
    let stats = client.stats();
    assert_eq!((stats.posted, stats.exchanges.answers, stats.exchanges.failures), (4000, 4001, 0));
}

#[test]
fn a_thousand_reads_are_in_flight_and_answered_in_any_order_of_waiting() {
    let running = start();
    let client = running.client();
    for n in 0..1024u32 {
        client.post_write(BAR, u64::from(n) * 4, &n.to_le_bytes()).unwrap();
    }
    let mut pending: Vec<_> =
        (0..1024u32).map(|n| (n, client.begin_read(BAR, u64::from(n) * 4, 4).unwrap())).collect();
    let kept: Vec<_> = pending.split_off(900);
    drop(kept);
    for (n, read) in pending.into_iter().rev() {
        let mut data = [0; 4];
        read.wait(&mut data).unwrap();
        assert_eq!(u32::from_le_bytes(data), n);
    }
    // What was dropped is not taken for anything else.
    let mut data = vec![0; 0x3000];
    client.read(BAR, 0, &mut data).unwrap();
    assert_eq!(data[4 * 1023..4 * 1024], 1023u32.to_le_bytes());
    assert_eq!(client.stats().late, 124);
}
