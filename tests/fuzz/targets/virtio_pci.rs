//! A virtio-pci device under a guest that writes anything into its configuration space and its BARs, and a
//! backend that shows it a file. What runs has its doorbells inside the BAR; nothing is bound that does not
//! run.
#![no_main]

use std::sync::Arc;

use devices::bus::BusDevice;
use devices::pci::{HostBridge, Window, Windows};
use devices::ports::WriteAddress;
use devices::virtio::backend::outlets::{Outlets, Tenancy};
use devices::virtio::backend::{Backend, BackendError, BackendStats, MemoryChange, Start, Stop};
use devices::virtio::types::model::{ConfigSource, Model, SharedMemory};
use devices::virtio::types::table::DeviceType;
use devices::virtio::{DeviceHandle, Parts, PciDevice, PhaseReport};
use fuzz::descriptors::{guest_memory, none_left};
use fuzz::input::Input;
use fuzz::ports::Recorder;
use fuzz::seeds::offer;
use libfuzzer_sys::fuzz_target;
use transport::memory::{GuestAddr, MemoryMap};
use transport::vhost_user::message::ShmemArea;
use transport::vhost_user::{DeviceFeatures, InflightArea, IovaMap, LiveSession, RingBase, Session};

const PAGE: u64 = 4096;
/// Bytes of the shared memory region.
const REGION: u64 = 5 * PAGE;

const WINDOWS: Windows = Windows {
    memory32: Window { base: 0xc000_0000, size: 0x1000_0000 },
    memory64: Window { base: 0x80_0000_0000, size: 0x20_0000_0000 },
    io: Window { base: 0xc000, size: 0x4000 },
};

/// A backend that works: whether it runs, and what it may do while it does.
struct Works(bool, Tenancy);

impl Backend for Works {
    fn start(&mut self, start: &Start<'_>) -> Result<Option<Arc<InflightArea>>, BackendError> {
        assert!(!std::mem::replace(&mut self.0, true), "started twice");
        for ring in start.rings {
            assert!(ring.size > 0 && ring.size <= 256);
        }
        self.1.begin();
        Ok(None)
    }

    fn stop(&mut self, _: Stop) -> Result<Vec<RingBase>, BackendError> {
        self.disconnect();
        Ok(Vec::new())
    }

    fn config(&mut self, written: Option<(u32, &[u8])>) -> Result<Vec<u8>, BackendError> {
        if let Some((offset, bytes)) = written {
            assert!(offset as usize + bytes.len() <= 60);
        }
        Ok(vec![7; 60])
    }

    fn change_memory(&mut self, _: &MemoryMap) -> Result<MemoryChange, BackendError> {
        Ok(MemoryChange::Done)
    }

    fn live(&mut self) -> Result<&mut LiveSession, BackendError> {
        Err(BackendError::Refused("no session".into()))
    }

    fn standing(&mut self) -> Result<&mut Session, BackendError> {
        Err(BackendError::Refused("no session".into()))
    }

    fn translations(&self) -> Option<&IovaMap> {
        None
    }

    fn notifies_in_band(&self) -> bool {
        false
    }

    fn takes_inflight(&self) -> bool {
        false
    }

    fn has_hung_up(&self) -> bool {
        false
    }

    fn disconnect(&mut self) {
        self.0 = false;
        self.1.end();
    }

    fn stats(&self) -> BackendStats {
        BackendStats::default()
    }
}

fuzz_target!(init: offer(&seeds()), |data: &[u8]| {
    none_left(|| drive(data));
});

/// A driver that starts both queues with MSI-X, then moves the BAR.
fn seeds() -> Vec<Vec<u8>> {
    let start = [&[0, 0, 0][..], &[1, 0], &[2, 0], &[3, 0], &[4, 0, 0], &[4, 0, 1], &[5, 0]].concat();
    // The backend shows something, and its BAR goes below 4 GiB.
    let window = [&start[..], &[16, 1, 8, 1, 7, 6, 3, 0, 0, 0, 0, 0, 0, 0, 0, 17]].concat();
    vec![[&start[..], &[6, 0, 5, 5, 0x90, 7, 0]].concat(), start, window]
}

fn drive(data: &[u8]) {
    let mut input = Input::new(data);
    let refuse = input.byte();
    let machine = Recorder::crowded(if refuse < 250 { 0 } else { usize::from(refuse - 249) });
    let bridge = HostBridge::new(WINDOWS);
    let model = Model {
        device_type: DeviceType::named("blk").expect("a type"),
        features: DeviceFeatures::from_bits(7 << 32 | 1 << 12),
        queues: 2,
        queue_size: 256,
        config: vec![0; 60],
        config_source: ConfigSource::Backend,
        shared_memory: vec![None, Some(SharedMemory { base: GuestAddr(0), length: REGION })],
    };
    let outlets = Outlets::new(vec![0, REGION]);
    let tenancy = outlets.tenancy();
    let parts = Parts {
        name: "fuzz".into(),
        model,
        backend: Box::new(Works(false, tenancy.clone())),
        outlets,
        memory: guest_memory(),
        service: None,
    };
    let handle = DeviceHandle::new(parts).expect("eventfds");
    let number = bridge.free().expect("there is room");
    let Ok(device) = PciDevice::new(&handle, number, &bridge, &machine.ports()) else {
        return assert_eq!(machine.counts(), (0, 0), "what was registered is undone");
    };
    let memory = guest_memory();
    let file = memory.regions()[0].fd();
    let area =
        |at: u64| ShmemArea { shmid: 1, padding: [0; 7], fd_offset: 0, shm_offset: at, len: PAGE, flags: 1 };
    let mut shown = Vec::new();
    bridge.insert(Some(number), Arc::new(device)).expect("there is room");
    let (ecam, memory) = (bridge.ecam(), bridge.memory(WINDOWS.memory32));
    while !input.is_empty() {
        match input.byte() % 18 {
            16 => {
                // What the backend asks for is on whole pages, and inside the region.
                let at = u64::from(input.byte() % 5) * PAGE;
                let file = file.try_clone_to_owned().expect("a descriptor");
                if tenancy.map(&area(at), file).is_ok() {
                    assert_eq!(handle.phase(), PhaseReport::Running, "what does not run may show nothing");
                    shown.push(at);
                }
            }
            17 => {
                // It may be gone since, with the queues.
                let _ = shown.pop().map(|at| tenancy.unmap(&area(at)));
            }
            what => step(what, &mut input, ecam.as_ref(), memory.as_ref()),
        }
        assert_inside(ecam.as_ref(), &machine.shown());
        let running = matches!(handle.phase(), PhaseReport::Running);
        assert!(running || machine.shown().is_empty());
        let doorbells = machine.doorbells();
        assert!(doorbells.len() <= 2 && (running || doorbells.is_empty()));
        for doorbell in doorbells {
            let WriteAddress::Memory(at) = doorbell.address else { panic!("a doorbell at a port") };
            let low = at.0 >= 0xc000_0000 && at.0 < 0xd000_0000;
            assert!(low || at.0 >= 0x80_0000_0000 && at.0 < 0xa0_0000_0000, "{:#x}", at.0);
            assert!(matches!(at.0 & 0x1_ffff, 0x1_0000 | 0x1_1000));
        }
    }
    tenancy.end();
    assert!(machine.shown().is_empty());
    handle.end();
    assert_eq!(machine.counts(), (0, 0));
    drop((handle, tenancy));
    drop((ecam, memory));
    bridge.clear();
    drop(bridge);
    assert_eq!(machine.counts(), (0, 0));
}

/// What a backend shows is in the BAR of its region, while that is decoded.
fn assert_inside(ecam: &dyn BusDevice, shown: &[(u64, u64)]) {
    let dword = |offset: u64| {
        let mut data = [0; 4];
        ecam.read(0x8000 + offset, &mut data);
        u64::from(u32::from_le_bytes(data))
    };
    let base = dword(0x1c) << 32 | dword(0x18) & !0xf;
    for (at, size) in shown {
        assert!(dword(4) & 2 != 0 && base <= *at && at + size <= base + REGION, "{at:#x} {base:#x}");
    }
}

fn step(what: u8, input: &mut Input, ecam: &dyn BusDevice, memory: &dyn BusDevice) {
    let config = |offset: u64, data: &[u8]| ecam.write(0x8000 + offset, data);
    let write = |offset: u64, data: &[u8]| memory.write(offset, data);
    match what {
        0 => config(4, &[6 | input.byte() & 1, 0]),
        1 => {
            for vector in 0..3_u64 {
                for (offset, value) in [(0, 0xfee0_0000_u32), (4, 0), (8, 0x30), (12, 0)] {
                    write(0x8000 + vector * 16 + offset, &value.to_le_bytes());
                }
            }
        }
        2 => config(0x42, &[0, 0x80 | input.byte() & 0x40]),
        3 => {
            [0_u8, 1, 3].iter().for_each(|status| write(0x14, &[*status]));
            write(8, &[1, 0, 0, 0]);
            write(0xc, &[1, 0, 0, 0]);
            write(0x14, &[0xb]);
        }
        4 => {
            let queue = input.byte() % 3;
            write(0x16, &[queue, 0]);
            write(0x18, &input.pick(&[256_u16, 1, 3, 257]).to_le_bytes());
            write(0x1a, &[queue + 1, 0]);
            for (offset, at) in [(0x20, 0x1000_u64), (0x28, 0x3000), (0x30, 0x4000)] {
                write(offset, &(u64::from(queue) << 16 | at).to_le_bytes());
            }
            write(0x1c, &[1, 0]);
        }
        5 => write(0x14, &[0xf]),
        6 => config(0x10 + 4 * u64::from(input.byte() & 3), &input.number().to_le_bytes()[..4]),
        7 => config(0x14, &[input.pick(&[0, 0x90, 0x9f, 0xa0]), 0, 0, 0]),
        8 => config(
            0x10 + 8 * u64::from(input.byte() & 1),
            &(0xc000_0000_u32 | u32::from(input.byte()) << 17).to_le_bytes(),
        ),
        9 | 10 => write(u64::from(input.byte() % 0x40), &input.bytes(8)),
        11 => write(u64::from(input.u32() % 0x2_0000), &input.bytes(8)),
        12 => config(u64::from(input.byte()), &input.bytes(4)),
        13 => memory.read(u64::from(input.u32() % 0x2_0000), &mut [0; 8]),
        14 => ecam.read(0x8000 + u64::from(input.byte()), &mut [0; 4]),
        _ => config(0xfc & u64::from(input.byte()), &input.bytes(4)),
    }
}
