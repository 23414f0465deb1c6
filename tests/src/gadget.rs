//! A vhost-user-rng backend in this process, on the crate `vhost-user-backend`, that also does what few
//! backends do: it shows the guest a file in a shared memory region, shares an object, and takes a display's
//! socket. Nothing of ours is in it.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::{pread, pwrite};
use vhost::vhost_user::message::{VhostUserMMap, VhostUserMMapFlags, VhostUserShMemConfig};
use vhost::vhost_user::{Backend, VhostUserFrontendReqHandler, VhostUserProtocolFeatures};
use vhost_user_backend::{VhostUserBackend, VringRwLock, VringT};
use virtio_queue::QueueOwnedT;
use vm_memory::{Bytes, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventNotifier};

use crate::served::{Served, lock};

/// Bytes of its shared memory region, id 0.
pub const REGION: u64 = 2 << 20;
/// Where in it the file is shown.
pub const PLACE: u64 = 0x4000;
/// Bytes of the file.
pub const FILE: u64 = 0x2000;
/// What the file begins with.
pub const WORD: u32 = 0x0b0a_7d42;

/// The backend behind a socket; serves one machine. Ends when the machine has gone, or when dropped.
pub struct Gadget {
    inner: Arc<Inner>,
    served: Served,
}

impl std::fmt::Debug for Gadget {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gadget").field("mapped", &self.inner.mapped).finish_non_exhaustive()
    }
}

impl Gadget {
    /// Waits until it listens.
    ///
    /// # Panics
    /// When the socket or the file cannot be made.
    #[must_use]
    pub fn start() -> Self {
        let file = memfd_create("gadget", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, FILE).unwrap();
        pwrite(&file, &WORD.to_le_bytes(), 0).unwrap();
        let inner = Arc::new(Inner {
            file,
            memory: Mutex::default(),
            channel: Mutex::default(),
            mapped: AtomicU64::new(0),
        });
        Self { served: Served::start("gadget", Arc::clone(&inner)), inner }
    }

    /// Where it listens.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.served.socket()
    }

    /// The 32-bit word at `offset` of its file now.
    ///
    /// # Panics
    /// When the file cannot be read.
    #[must_use]
    pub fn word(&self, offset: u64) -> u32 {
        let mut word = [0; 4];
        pread(&self.inner.file, &mut word, offset).unwrap();
        u32::from_le_bytes(word)
    }

    /// How often its file was shown, as the front end acknowledged.
    #[must_use]
    pub fn mapped(&self) -> u64 {
        self.inner.mapped.load(Ordering::Relaxed)
    }
}

struct Inner {
    file: OwnedFd,
    memory: Mutex<Option<GuestMemoryAtomic<GuestMemoryMmap>>>,
    channel: Mutex<Option<Backend>>,
    mapped: AtomicU64,
}

impl Inner {
    fn show(&self) -> io::Result<()> {
        let area = VhostUserMMap {
            shm_offset: PLACE,
            len: FILE,
            flags: VhostUserMMapFlags::WRITABLE.bits(),
            ..VhostUserMMap::default()
        };
        let file: File = self.file.try_clone()?.into();
        lock(&self.channel).as_ref().ok_or(io::ErrorKind::NotConnected)?.shmem_map(&area, &file)?;
        self.mapped.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

impl VhostUserBackend for Inner {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        1
    }

    fn max_queue_size(&self) -> usize {
        256
    }

    fn features(&self) -> u64 {
        1 << 32 | 1 << 30
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::BACKEND_SEND_FD
            | VhostUserProtocolFeatures::SHMEM
    }

    fn set_event_idx(&self, _enabled: bool) {}

    fn set_backend_req_fd(&self, backend: Backend) {
        *lock(&self.channel) = Some(backend);
    }

    fn get_shmem_config(&self) -> io::Result<VhostUserShMemConfig> {
        Ok(VhostUserShMemConfig::new(1, &[REGION]))
    }

    fn update_memory(&self, memory: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        *lock(&self.memory) = Some(memory);
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        vmm_sys_util::event::new_event_consumer_and_notifier(vmm_sys_util::event::EventFlag::NONBLOCK).ok()
    }

    /// Each request is filled with `Z`; at the first one the file is shown.
    fn handle_event(
        &self,
        _event: u16,
        _set: EventSet,
        vrings: &[VringRwLock],
        _thread: usize,
    ) -> io::Result<()> {
        if self.mapped.load(Ordering::Relaxed) == 0 {
            self.show()?;
        }
        let memory = lock(&self.memory).as_ref().expect("memory before the first kick").memory();
        let vring = &vrings[0];
        let chains: Vec<_> = vring.get_mut().get_queue_mut().iter(memory.clone()).unwrap().collect();
        for chain in chains {
            let (head, mut length) = (chain.head_index(), 0);
            for descriptor in chain {
                let bytes = vec![b'Z'; usize::try_from(descriptor.len()).unwrap()];
                memory.write_slice(&bytes, descriptor.addr()).unwrap();
                length += descriptor.len();
            }
            vring.add_used(head, length).unwrap();
        }
        vring.signal_used_queue()
    }
}
