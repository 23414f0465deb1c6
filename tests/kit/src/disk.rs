//! A vhost-user-blk backend in this process, on the crates that rust backends are made of:
//! `vhost-user-backend`, `virtio-queue`, `vm-memory`. An independent view of the protocol: nothing of ours is
//! in it.

use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use vhost::vhost_user::VhostUserProtocolFeatures;
use vhost_user_backend::{VhostUserBackend, VringRwLock, VringT};
use virtio_queue::QueueOwnedT;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventNotifier};

use crate::served::{Served, lock};

/// Bytes of a sector.
pub const SECTOR: usize = 512;

/// The byte that fills sector `number` at first.
#[must_use]
pub fn pattern(number: usize) -> u8 {
    u8::try_from(number % 251).unwrap_or(0)
}

const VERSION_1: u64 = 1 << 32;
const PROTOCOL_FEATURES: u64 = 1 << 30;
const OK: u8 = 0;
const IO_ERROR: u8 = 1;

/// A disk in memory behind a socket; serves one machine. Ends when the machine has gone, or when dropped.
pub struct MemoryDisk {
    disk: Arc<Disk>,
    served: Served,
}

impl std::fmt::Debug for MemoryDisk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MemoryDisk").field("served", &self.served()).finish_non_exhaustive()
    }
}

impl MemoryDisk {
    /// A disk of `size` bytes, in which every byte of sector n is [`pattern`] of n.
    ///
    /// # Panics
    /// When the socket cannot be made.
    #[must_use]
    pub fn new(size: usize) -> Self {
        let bytes = (0..size).map(|byte| pattern(byte / SECTOR)).collect();
        let disk =
            Arc::new(Disk { bytes: Mutex::new(bytes), memory: Mutex::new(None), served: AtomicU64::new(0) });
        Self { served: Served::start("memory-disk", Arc::clone(&disk)), disk }
    }

    /// Where it listens.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.served.socket()
    }

    /// Changes the size; new bytes are 0. The machine is not told.
    pub fn resize(&self, size: usize) {
        lock(&self.disk.bytes).resize(size, 0);
    }

    /// The bytes now.
    #[must_use]
    pub fn contents(&self) -> Vec<u8> {
        lock(&self.disk.bytes).clone()
    }

    /// How many requests it has answered.
    #[must_use]
    pub fn served(&self) -> u64 {
        self.disk.served.load(Ordering::Relaxed)
    }
}

struct Disk {
    bytes: Mutex<Vec<u8>>,
    memory: Mutex<Option<GuestMemoryAtomic<GuestMemoryMmap>>>,
    served: AtomicU64,
}

impl Disk {
    fn serve(&self, memory: &GuestMemoryMmap, chain: &[Descriptor]) -> u32 {
        let (Some(first), Some(last)) = (chain.first(), chain.last()) else { return 0 };
        // Virtio 1.2 §5.2.6: type, reserved, sector.
        let mut header = [0; 16];
        memory.read_slice(&mut header, first.addr()).unwrap();
        let [kind, ..] = header;
        let mut at = usize::from_le_bytes(header[8..].try_into().unwrap()) * SECTOR;
        let (mut status, mut written) = (OK, 0);
        for data in &chain[1..chain.len() - 1] {
            let mut bytes = lock(&self.bytes);
            let length = usize::try_from(data.len()).unwrap();
            let Some(place) = bytes.get_mut(at..at + length) else {
                status = IO_ERROR;
                break;
            };
            match kind {
                0 => {
                    memory.write_slice(place, data.addr()).unwrap();
                    written += data.len();
                }
                1 => memory.read_slice(place, data.addr()).unwrap(),
                _ => status = 2,
            }
            at += length;
        }
        memory.write_obj(status, last.addr()).unwrap();
        self.served.fetch_add(1, Ordering::Relaxed);
        written + 1
    }
}

impl VhostUserBackend for Disk {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        1
    }

    fn max_queue_size(&self) -> usize {
        256
    }

    fn features(&self) -> u64 {
        VERSION_1 | PROTOCOL_FEATURES
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::BACKEND_REQ
    }

    fn set_event_idx(&self, _enabled: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let sectors = lock(&self.bytes).len() / SECTOR;
        let mut config = u64::try_from(sectors).unwrap().to_le_bytes().to_vec();
        config.resize(usize::try_from(offset + size).unwrap(), 0);
        config.split_off(usize::try_from(offset).unwrap())
    }

    fn update_memory(&self, memory: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        *lock(&self.memory) = Some(memory);
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        vmm_sys_util::event::new_event_consumer_and_notifier(vmm_sys_util::event::EventFlag::NONBLOCK).ok()
    }

    fn handle_event(
        &self,
        _event: u16,
        _set: EventSet,
        vrings: &[VringRwLock],
        _thread: usize,
    ) -> io::Result<()> {
        let memory = lock(&self.memory).as_ref().expect("memory before the first kick").memory();
        let vring = &vrings[0];
        let chains: Vec<_> = vring.get_mut().get_queue_mut().iter(memory.clone()).unwrap().collect();
        for chain in chains {
            let head = chain.head_index();
            let descriptors: Vec<_> = chain.collect();
            let length = self.serve(&memory, &descriptors);
            vring.add_used(head, length).unwrap();
        }
        vring.signal_used_queue()
    }
}
