//! Against a backend that we did not write: the rust-vmm `vhost-user-backend` crate, which virtiofsd and the
//! vhost-device family are made of. Its device puts every buffer straight into the used ring.

#![cfg(test)]

mod support;

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use support::{GuestMemory, Rings, Scratch, eventually};
use transport::memory::DirtyLog;
use transport::memory::log_size;
use transport::memory::{GuestAddr, SharedRegion};
use transport::peer::{Cause, Limits};
use transport::vhost_user::backend_requests::BackendRequests;
use transport::vhost_user::message::{ShmemArea, Uuid};
use transport::vhost_user::{Connection, ProtocolFeatures, Refused, RingBase, RingSwitch, Session, Wanted};
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserMMap, VhostUserProtocolFeatures,
    VhostUserShMemConfig, VhostUserSharedMsg,
};
use vhost::vhost_user::{Backend, Listener, VhostUserFrontendReqHandler};
use vhost_user_backend::bitmap::BitmapMmapRegion;
use vhost_user_backend::{VhostUserBackend, VhostUserDaemon, VringRwLock, VringT};
use virtio_queue::QueueOwnedT;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

type P = ProtocolFeatures;
type Memory = GuestMemoryAtomic<GuestMemoryMmap<BitmapMmapRegion>>;

struct Device {
    memory: Mutex<Option<Memory>>,
    acked: AtomicU64,
    resets: AtomicU32,
    channel: Mutex<Option<Backend>>,
    config: Mutex<Vec<u8>>,
    state: Mutex<Option<File>>,
    gpu: AtomicU32,
}

impl Device {
    fn new() -> Self {
        Self {
            memory: Mutex::new(None),
            acked: AtomicU64::new(0),
            resets: AtomicU32::new(0),
            channel: Mutex::new(None),
            config: Mutex::new((0..36).collect()),
            state: Mutex::new(None),
            gpu: AtomicU32::new(0),
        }
    }
}

impl VhostUserBackend for Device {
    type Bitmap = BitmapMmapRegion;
    type Vring = VringRwLock<Memory>;

    fn num_queues(&self) -> usize {
        2
    }

    fn max_queue_size(&self) -> usize {
        1024
    }

    fn features(&self) -> u64 {
        1 << 32 | 1 << 30 | 1 << 29 | 1 << 28 | 1 << 26
    }

    fn acked_features(&self, features: u64) {
        self.acked.store(features, Ordering::SeqCst);
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        // Without those that the crate itself does not implement.
        VhostUserProtocolFeatures::all()
            - VhostUserProtocolFeatures::INFLIGHT_SHMFD
            - VhostUserProtocolFeatures::PAGEFAULT
            - VhostUserProtocolFeatures::STATUS
            - VhostUserProtocolFeatures::XEN_MMAP
    }

    fn reset_device(&self) {
        self.resets.fetch_add(1, Ordering::SeqCst);
    }

    fn set_event_idx(&self, _enabled: bool) {}

    /// Ignores offset and size, as several do.
    fn get_config(&self, _offset: u32, _size: u32) -> Vec<u8> {
        self.config.lock().unwrap().clone()
    }

    fn set_config(&self, offset: u32, bytes: &[u8]) -> std::io::Result<()> {
        let offset = usize::try_from(offset).unwrap();
        self.config.lock().unwrap()[offset..offset + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn update_memory(&self, memory: Memory) -> std::io::Result<()> {
        *self.memory.lock().unwrap() = Some(memory);
        Ok(())
    }

    fn set_backend_req_fd(&self, backend: Backend) {
        *self.channel.lock().unwrap() = Some(backend);
    }

    fn get_shared_object(&self, uuid: VhostUserSharedMsg) -> std::io::Result<File> {
        if uuid.uuid.as_bytes()[0] == 7 {
            File::open("/dev/zero")
        } else {
            Err(std::io::ErrorKind::NotFound.into())
        }
    }

    fn set_gpu_socket(&self, _gpu: vhost::vhost_user::GpuBackend) -> std::io::Result<()> {
        self.gpu.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK).ok()
    }

    fn handle_event(
        &self,
        event: u16,
        _events: EventSet,
        vrings: &[Self::Vring],
        _thread: usize,
    ) -> std::io::Result<()> {
        let memory = self.memory.lock().unwrap().clone().unwrap();
        let Some(vring) = vrings.get(usize::from(event)) else { return Ok(()) };
        let heads: Vec<u16> = {
            let mut state = vring.get_mut();
            let chains = state.get_queue_mut().iter(memory.memory()).unwrap();
            chains.map(|chain| chain.head_index()).collect()
        };
        for head in heads {
            vring.add_used(head, 0).unwrap();
        }
        vring.signal_used_queue()
    }

    fn set_device_state_fd(
        &self,
        direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        mut file: File,
    ) -> std::io::Result<Option<File>> {
        match direction {
            VhostTransferStateDirection::SAVE => file.write_all(b"the state of a rust device")?,
            VhostTransferStateDirection::LOAD => *self.state.lock().unwrap() = Some(file),
        }
        Ok(None)
    }

    fn check_device_state(&self) -> std::io::Result<()> {
        let Some(mut file) = self.state.lock().unwrap().take() else { return Ok(()) };
        let mut state = String::new();
        file.read_to_string(&mut state)?;
        if state == "the state of a rust device" {
            Ok(())
        } else {
            Err(std::io::ErrorKind::InvalidData.into())
        }
    }

    fn get_shmem_config(&self) -> std::io::Result<VhostUserShMemConfig> {
        Ok(VhostUserShMemConfig::new(1, &[0x20_0000]))
    }
}

struct Running {
    device: Arc<Device>,
    daemon: VhostUserDaemon<Arc<Device>>,
    session: Option<Session>,
    _scratch: Scratch,
}

fn start(wanted: &Wanted) -> Running {
    let scratch = Scratch::new();
    let path = scratch.path("s");
    let device = Arc::new(Device::new());
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::<BitmapMmapRegion>::new());
    let mut daemon = VhostUserDaemon::new("test".into(), Arc::clone(&device), memory).unwrap();
    let mut listener = Listener::new(&path, false).unwrap();
    let connection = Connection::connect(&path, &Limits::new(Duration::from_secs(5))).unwrap();
    daemon.start(&mut listener).unwrap();
    let session = connection.negotiate(wanted).unwrap();
    Running { device, daemon, session: Some(session), _scratch: scratch }
}

impl Running {
    fn session(&mut self) -> Session {
        self.session.take().unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.session = None;
        drop(self.daemon.wait());
    }
}

/// Makes one buffer of ring 0 available and waits until it is used.
fn pass_a_buffer(memory: &GuestMemory, rings: &Rings, next: &mut u16) {
    let (available, used) = (0x1_2000, 0x1_3000);
    let mut descriptor = 0x8_0000u64.to_le_bytes().to_vec();
    descriptor.extend(16u32.to_le_bytes());
    descriptor.extend([0; 4]);
    memory.write(0x1_0000, &descriptor);
    memory.write(available + 4 + 2 * u64::from(*next % 128), &0u16.to_le_bytes());
    *next = next.wrapping_add(1);
    memory.write(available + 2, &next.to_le_bytes());
    rings.kicks[0].ring().unwrap();
    eventually("a used buffer", Duration::from_secs(5), || memory.read_u16(used + 2) == *next);
}

#[test]
fn rings_run_stop_and_start_again_and_config_goes_both_ways() {
    let mut running = start(&Wanted::default());
    let mut session = running.session();
    assert!(session.protocol().contains(P::MQ.with(P::REPLY_ACK).with(P::CONFIG).with(P::BACKEND_REQ)));
    assert_eq!(session.queue_num(), 2);
    assert_eq!(
        session.read_config(60).unwrap(),
        (0..36).collect::<Vec<u8>>(),
        "60 is refused, 36 is the size"
    );
    session.write_config(4, &[0xee]).unwrap();
    assert_eq!(session.read_config(36).unwrap()[4], 0xee);

    let (memory, rings, mut next) = (GuestMemory::new(2 << 20), Rings::new(), 0);
    let features = session.offered().accept(1 << 32).unwrap();
    let mut live = session.go_live(features, &memory.map, &rings.rings(0)).unwrap();
    for _ in 0..300 {
        pass_a_buffer(&memory, &rings, &mut next);
    }
    assert!(rings.calls[0].take().unwrap() > 0);
    assert_eq!(running.device.acked.load(Ordering::SeqCst), 1 << 32 | 1 << 30);
    live.switch_rings(&[1], RingSwitch::Disabled).unwrap();
    let (session, bases) = live.stop().unwrap();
    assert_eq!(bases, [RingBase(300), RingBase(0)]);

    // Goes on where it was.
    let live = session.go_live(features, &memory.map, &rings.rings(300)).unwrap();
    pass_a_buffer(&memory, &rings, &mut next);
    assert_eq!(running.device.resets.load(Ordering::SeqCst), 0);

    // The guest reset its device: everything begins anew.
    let session = live.reset().unwrap();
    assert_eq!(running.device.resets.load(Ordering::SeqCst), 1);
    memory.write(0x1_2000, &[0; 4]);
    memory.write(0x1_3000, &[0; 4]);
    next = 0;
    let live = session.go_live(features, &memory.map, &rings.rings(0)).unwrap();
    pass_a_buffer(&memory, &rings, &mut next);
    drop(live);
}

#[test]
fn writes_are_logged_before_and_after_a_restart_and_no_more_when_told() {
    let mut running = start(&Wanted::default());
    let session = running.session();
    let (memory, rings, mut next) = (GuestMemory::new(2 << 20), Rings::new(), 0);
    let features = session.offered().accept(1 << 32).unwrap();
    let mut live = session.go_live(features, &memory.map, &rings.rings(0)).unwrap();
    pass_a_buffer(&memory, &rings, &mut next);

    let size = log_size(&memory.map);
    let fd = rustix::fs::memfd_create("log", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, size).unwrap();
    let ours = fd.try_clone().unwrap();
    // The used ring is at 0x13000: page 0x13, byte 2, bit 3.
    let take_bit = || {
        let mut byte = [0];
        rustix::io::pread(&ours, &mut byte, 2).unwrap();
        rustix::io::pwrite(&ours, &[0], 2).unwrap();
        byte[0] & 1 << 3 != 0
    };
    live.start_log(Arc::new(DirtyLog::new(fd, size, 0))).unwrap();
    pass_a_buffer(&memory, &rings, &mut next);
    assert!(take_bit(), "the used ring was written");

    let (session, bases) = live.stop().unwrap();
    take_bit();
    let mut live = session.go_live(features, &memory.map, &rings.rings(bases[0].0)).unwrap();
    pass_a_buffer(&memory, &rings, &mut next);
    assert!(take_bit(), "also after a restart");
    live.stop_log().unwrap();
    pass_a_buffer(&memory, &rings, &mut next);
    drop(live);
}

#[test]
fn memory_is_added_and_removed_while_the_device_runs() {
    let mut running = start(&Wanted::default().and(P::CONFIGURE_MEM_SLOTS));
    let session = running.session();
    let (memory, rings, mut next) = (GuestMemory::new(2 << 20), Rings::new(), 0);
    let features = session.offered().accept(1 << 32).unwrap();
    let mut live = session.go_live(features, &memory.map, &rings.rings(0)).unwrap();
    let more = GuestMemory::new(2 << 20);
    let fd = Arc::clone(more.map.regions()[0].shared_fd());
    let region = SharedRegion::new(GuestAddr(1 << 32), 2 << 20, fd, 0);
    live.add_region(&region).unwrap();
    pass_a_buffer(&memory, &rings, &mut next);
    live.remove_region(&region).unwrap();
    pass_a_buffer(&memory, &rings, &mut next);
    drop(live);
}

#[test]
fn state_moves_out_and_in_and_garbage_is_reported() {
    let mut running = start(&Wanted::default().and(P::DEVICE_STATE));
    let mut session = running.session();
    let mut state = Vec::new();
    assert_eq!(session.save_state(&mut state, 1 << 20).unwrap(), 26);
    assert_eq!(state, b"the state of a rust device");
    session.load_state(&mut state.as_slice()).unwrap();
    let error = session.load_state(&mut b"garbage".as_slice()).unwrap_err();
    assert!(matches!(error.cause(), Cause::Refused(1)), "{error:?}");
    assert!(session.read_config(36).is_ok(), "the connection goes on");
}

#[derive(Default)]
struct Machine {
    objects: Mutex<Vec<u8>>,
    mapped: Mutex<Vec<(u8, u64, u64)>>,
}

impl BackendRequests for Machine {
    fn config_changed(&self) {}

    fn shared_object_add(&self, uuid: Uuid) -> Result<(), Refused> {
        self.objects.lock().unwrap().push(uuid.bytes[0]);
        Ok(())
    }

    fn shared_object_lookup(&self, _uuid: Uuid) -> Result<OwnedFd, Refused> {
        let mut file = tempfile();
        file.write_all(b"an object").unwrap();
        file.rewind().unwrap();
        Ok(file.into())
    }

    fn shmem_map(&self, area: ShmemArea, fd: OwnedFd) -> Result<(), Refused> {
        assert!(transport::peer::fds::file_size(&fd) >= area.len);
        self.mapped.lock().unwrap().push((area.shmid, area.shm_offset, area.len));
        Ok(())
    }
}

fn tempfile() -> File {
    rustix::fs::memfd_create("file", rustix::fs::MemfdFlags::CLOEXEC).unwrap().into()
}

#[test]
fn the_backend_channel_answers_a_backend_that_waits_for_us() {
    let both = P::SHMEM.with(P::SHARED_OBJECT).with(P::BACKEND_SEND_FD);
    let mut running = start(&Wanted::default().and(both));
    let mut session = running.session();
    assert_eq!(session.shmem_config().unwrap(), [0x20_0000]);
    let mut channel = session.take_backend_channel().unwrap();
    eventually("the channel's arrival", Duration::from_secs(5), || {
        running.device.channel.lock().unwrap().is_some()
    });
    let asker = running.device.channel.lock().unwrap().clone().unwrap();
    // Each of these blocks until our acknowledgement comes.
    let asking = std::thread::spawn(move || {
        let uuid = VhostUserSharedMsg::default();
        let added = asker.shared_object_add(&uuid).is_ok();
        let file = tempfile();
        file.set_len(0x2000).unwrap();
        let map = VhostUserMMap { len: 0x1000, shm_offset: 0x3000, ..VhostUserMMap::default() };
        let mapped = asker.shmem_map(&map, &file).is_ok();
        let unmapped = asker.shmem_unmap(&map).is_ok();
        (added, mapped, unmapped)
    });
    let machine = Machine::default();
    eventually("the end of the questions", Duration::from_secs(5), || {
        channel.serve(&machine).unwrap();
        asking.is_finished()
    });
    let (_added, mapped, unmapped) = asking.join().unwrap();
    assert!(mapped, "SHMEM_MAP was acknowledged");
    assert!(!unmapped, "this machine does not unmap, and says so");
    assert_eq!(*machine.mapped.lock().unwrap(), [(0, 0x3000, 0x1000)]);
}

#[test]
fn objects_and_gpu_sockets_are_passed_on() {
    let mut running = start(&Wanted::default().and(P::SHARED_OBJECT).and(P::BACKEND_SEND_FD));
    let mut session = running.session();
    let (display, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    session.set_gpu_socket(display.as_fd()).unwrap();
    assert_eq!(running.device.gpu.load(Ordering::SeqCst), 1);
    let (memory, rings) = (GuestMemory::new(2 << 20), Rings::new());
    let features = session.offered().accept(1 << 32).unwrap();
    let mut live = session.go_live(features, &memory.map, &rings.rings(0)).unwrap();
    assert!(live.shared_object(Uuid { bytes: [7; 16] }).is_ok());
    let error = live.shared_object(Uuid { bytes: [8; 16] }).unwrap_err();
    assert!(matches!(error.cause(), Cause::Refused(_)), "{error:?}");
}
