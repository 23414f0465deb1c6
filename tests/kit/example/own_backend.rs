//! A vhost-user backend and its own test, as a crate outside of this workspace has them.

use std::io;
use std::sync::{Arc, OnceLock};

use outboard_testkit::kernel::CommandLine;
use outboard_testkit::machine::TestMachine;
use outboard_testkit::served::Served;
use vhost::vhost_user::VhostUserProtocolFeatures;
use vhost_user_backend::{VhostUserBackend, VringRwLock, VringT};
use virtio_queue::QueueOwnedT;
use vm_memory::{Bytes, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

/// A source of random numbers, each of which is 7.
#[derive(Default)]
struct Sevens {
    memory: OnceLock<GuestMemoryAtomic<GuestMemoryMmap>>,
}

impl VhostUserBackend for Sevens {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        1
    }

    fn max_queue_size(&self) -> usize {
        64
    }

    fn features(&self) -> u64 {
        // VIRTIO_F_VERSION_1, VHOST_USER_F_PROTOCOL_FEATURES.
        1 << 32 | 1 << 30
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK
    }

    fn set_event_idx(&self, _enabled: bool) {}

    fn update_memory(&self, memory: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        self.memory.get_or_init(|| memory);
        Ok(())
    }

    /// What ends the thread of the crate `vhost-user-backend` that waits for kicks.
    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK).ok()
    }

    fn handle_event(&self, _: u16, _: EventSet, vrings: &[VringRwLock], _: usize) -> io::Result<()> {
        let memory = self.memory.get().expect("memory comes before the first kick").memory();
        let vring = &vrings[0];
        let chains: Vec<_> = vring.get_mut().get_queue_mut().iter(memory.clone()).unwrap().collect();
        for chain in chains {
            let (head, mut length) = (chain.head_index(), 0);
            for buffer in chain.writable() {
                memory.write_slice(&vec![7; buffer.len() as usize], buffer.addr()).unwrap();
                length += buffer.len();
            }
            vring.add_used(head, length).unwrap();
        }
        vring.signal_used_queue()
    }
}

#[test]
fn a_guest_reads_a_thousand_times_and_gets_sevens() {
    let backend = Served::start("sevens", Arc::new(Sevens::default()));

    let ended = TestMachine::boot(CommandLine::rng(1000)).vhost_user("rng", &backend.socket()).run();

    assert_eq!((ended.number("requests"), ended.number("errors")), (1000, 0), "{ended}");
    assert!(ended.console.contains("entropy 07 07 07 07"), "{ended}");
    // The requests went past the VMM.
    assert_eq!(ended.outcome.stats.devices[0].requests_through_vmm, 0, "{ended}");
}
