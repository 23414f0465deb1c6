//! A machine without KVM, for devices: it keeps the page that a guest would read, and holds devices to the
//! rules of its ports.

use std::collections::BTreeSet;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard};

use devices::ports::{
    Access, DeviceMemory, Doorbells, FileRange, Guard, Interrupts, OnVanished, PortError, Ports,
    RegisterPage, Route, WriteMatch,
};
use transport::memory::GuestAddr;

/// What is registered now.
#[derive(Debug, Default)]
struct Now {
    doorbells: Vec<WriteMatch>,
    routes: BTreeSet<i32>,
    /// Address and size of each piece of a file.
    pieces: Vec<(u64, u64)>,
    page: Vec<u8>,
    /// A guest may ask for them.
    conflicts_are_refused: bool,
    /// Registrations to refuse, counted down; 0 refuses none.
    refuse_at: usize,
}

/// The machine.
#[derive(Clone, Debug, Default)]
pub struct Recorder(Arc<Mutex<Now>>);

impl Recorder {
    /// A machine that refuses its `nth` registration; none when 0.
    pub fn refusing(nth: usize) -> Self {
        let recorder = Self::default();
        recorder.now().refuse_at = nth;
        recorder
    }

    /// The same for devices that the guest can put on top of each other: what is taken is refused.
    pub fn crowded(nth: usize) -> Self {
        let recorder = Self::refusing(nth);
        recorder.now().conflicts_are_refused = true;
        recorder
    }

    /// Where writes of the guest end in the kernel.
    pub fn doorbells(&self) -> Vec<WriteMatch> {
        self.now().doorbells.clone()
    }

    /// Address and size of each piece of a file that the guest sees.
    pub fn shown(&self) -> Vec<(u64, u64)> {
        self.now().pieces.clone()
    }

    fn now(&self) -> MutexGuard<'_, Now> {
        self.0.lock().expect("no panic")
    }

    /// Its ports.
    pub fn ports(&self) -> Ports {
        let all = Arc::new(self.clone());
        Ports { doorbells: all.clone(), interrupts: all.clone(), memory: all }
    }

    /// How many doorbells and how many routes there are.
    pub fn counts(&self) -> (usize, usize) {
        let now = self.now();
        (now.doorbells.len(), now.routes.len())
    }

    /// What a guest reads at `at` without an exit.
    pub fn page(&self, at: usize, length: usize) -> Vec<u8> {
        self.now().page[at..at + length].to_vec()
    }

    /// The same, as a register.
    pub fn page_u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.page(at, 4).try_into().expect("four bytes"))
    }

    fn refuses(&self) -> Result<(), PortError> {
        let mut now = self.now();
        if now.refuse_at > 0 {
            now.refuse_at -= 1;
            if now.refuse_at == 0 {
                return Err(PortError::new("do that", std::io::ErrorKind::OutOfMemory.into()));
            }
        }
        Ok(())
    }
}

impl Doorbells for Recorder {
    fn bind(&self, _: BorrowedFd<'_>, when: WriteMatch) -> Result<Guard, PortError> {
        self.refuses()?;
        let mut now = self.now();
        if now.doorbells.contains(&when) {
            assert!(now.conflicts_are_refused, "{when:?} is bound twice");
            return Err(PortError::new("bind that twice", std::io::ErrorKind::AlreadyExists.into()));
        }
        now.doorbells.push(when);
        let undo = self.clone();
        Ok(Guard::on_drop(move || undo.now().doorbells.retain(|other| *other != when)))
    }
}

impl Interrupts for Recorder {
    fn attach(&self, call: BorrowedFd<'_>, _: Route) -> Result<Guard, PortError> {
        self.refuses()?;
        let fd = call.as_raw_fd();
        assert!(self.now().routes.insert(fd), "an eventfd is attached twice");
        let undo = self.clone();
        Ok(Guard::on_drop(move || {
            undo.now().routes.remove(&fd);
        }))
    }

    fn attach_level(&self, call: BorrowedFd<'_>, _: u32, _: BorrowedFd<'_>) -> Result<Guard, PortError> {
        self.attach(call, Route::Pin(0))
    }
}

impl DeviceMemory for Recorder {
    fn register_page(&self, _: GuestAddr) -> Result<Arc<dyn RegisterPage>, PortError> {
        self.refuses()?;
        self.now().page = vec![0; 4096];
        Ok(Arc::new(self.clone()))
    }

    fn map(&self, piece: &FileRange, at: GuestAddr, _: Access, _: OnVanished) -> Result<Guard, PortError> {
        self.refuses()?;
        let size = piece.size;
        assert_eq!((at.0 | piece.offset | size) % 4096, 0, "a piece of a file is not aligned");
        let end = at.0.checked_add(size).expect("no piece wraps");
        let mut now = self.now();
        let free = now.pieces.iter().all(|(other, size)| end <= *other || other + size <= at.0);
        if !free {
            // A guest may put two BARs at the same place.
            return Err(PortError::new("do that", std::io::ErrorKind::AlreadyExists.into()));
        }
        now.pieces.push((at.0, size));
        let undo = self.clone();
        Ok(Guard::on_drop(move || undo.now().pieces.retain(|(other, _)| *other != at.0)))
    }
}

impl RegisterPage for Recorder {
    fn store(&self, offset: u16, value: u32) {
        assert_eq!(offset % 4, 0, "a register is not aligned");
        self.store_bytes(offset, &value.to_le_bytes());
    }

    fn store_bytes(&self, offset: u16, bytes: &[u8]) {
        let offset = usize::from(offset);
        self.now().page[offset..offset + bytes.len()].copy_from_slice(bytes);
    }
}
