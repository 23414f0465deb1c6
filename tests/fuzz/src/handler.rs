//! A machine that takes a backend's own requests seriously, and checks what is let through to it.

use std::os::fd::OwnedFd;
use std::sync::Mutex;

use transport::memory::{PAGE, UserAddr};
use transport::peer::fds::file_size;
use transport::vhost_user::backend_requests::NotifierArea;
use transport::vhost_user::message::{Iotlb, ShmemArea, Uuid};
use transport::vhost_user::shmem::ShmemRegions;
use transport::vhost_user::{BackendRequests, IovaMap, Refused};

use crate::descriptors::{guest_memory, memory_file};

/// The sizes of the shared memory regions.
const REGIONS: [u64; 3] = [0x4000, 0, 0x10_0000];

/// Answers every request; notes what came.
#[derive(Debug)]
pub struct Handler {
    /// What came, in order.
    pub seen: Mutex<Vec<String>>,
    shmem: Mutex<ShmemRegions>,
    iova: IovaMap,
}

impl Default for Handler {
    fn default() -> Self {
        Self {
            seen: Mutex::default(),
            shmem: Mutex::new(ShmemRegions::new(REGIONS.to_vec())),
            iova: IovaMap::identity(&guest_memory()),
        }
    }
}

impl Handler {
    fn note(&self, what: impl Into<String>) {
        self.seen.lock().expect("no panic").push(what.into());
    }
}

impl BackendRequests for Handler {
    fn config_changed(&self) {
        self.note("configuration");
    }

    fn host_notifier(&self, ring: u8, area: Option<NotifierArea>) -> Result<(), Refused> {
        self.note(format!("notifier {ring} {:?}", area.as_ref().map(|area| (area.size, area.offset))));
        if ring < 4 { Ok(()) } else { Err(Refused) }
    }

    fn iotlb(&self, message: Iotlb) -> Result<(), Refused> {
        self.note(format!("iotlb {message:?}"));
        let update = self.iova.answer(&message).ok_or(Refused)?;
        let guest = UserAddr::guest_of(update.user).expect("an address above the bias");
        assert_eq!((guest.raw(), update.kind), (update.iova, 2), "each address means itself");
        assert!((update.iova..update.iova + update.size).contains(&message.iova));
        Ok(())
    }

    fn vring_call(&self, ring: u32) -> Result<(), Refused> {
        self.note(format!("call {ring}"));
        Ok(())
    }

    fn vring_error(&self, ring: u32) -> Result<(), Refused> {
        self.note(format!("error {ring}"));
        Ok(())
    }

    fn shared_object_add(&self, uuid: Uuid) -> Result<(), Refused> {
        self.note(format!("add {:?}", uuid.bytes));
        Ok(())
    }

    fn shared_object_remove(&self, uuid: Uuid) -> Result<(), Refused> {
        self.note(format!("remove {:?}", uuid.bytes));
        Ok(())
    }

    fn shared_object_lookup(&self, uuid: Uuid) -> Result<OwnedFd, Refused> {
        self.note(format!("lookup {:?}", uuid.bytes));
        if uuid.bytes[0] & 1 == 0 { Ok(memory_file(1)) } else { Err(Refused) }
    }

    fn shmem_map(&self, area: ShmemArea, fd: OwnedFd) -> Result<(), Refused> {
        self.note(format!("map {area:?}"));
        let size = file_size(&fd);
        let place = self.shmem.lock().expect("no panic").map(&area, size).map_err(|_| Refused)?;
        let region = REGIONS[usize::from(place.region)];
        assert!(place.size > 0 && place.at.checked_add(place.size).is_some_and(|end| end <= region));
        assert!(place.file_offset.checked_add(place.size).is_some_and(|end| end <= size));
        assert!([place.at, place.size, place.file_offset].iter().all(|n| n % PAGE == 0));
        Ok(())
    }

    fn shmem_unmap(&self, area: ShmemArea) -> Result<(), Refused> {
        self.note(format!("unmap {area:?}"));
        self.shmem.lock().expect("no panic").unmap(&area).map(drop).map_err(|_| Refused)
    }
}
