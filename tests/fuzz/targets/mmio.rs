//! A virtio-mmio device under a driver that writes anything anywhere, with a backend that fails when it
//! likes. What a guest reads without an exit is what a trapped read gives; nothing is bound that does not
//! run.
#![no_main]

use std::sync::{Arc, Mutex};

use devices::virtio::backend::outlets::Outlets;
use devices::virtio::backend::{Backend, BackendError, BackendStats, MemoryChange, Start, Stop};
use devices::virtio::recovery::vacancy::Candidate;
use devices::virtio::served::service_of;
use devices::virtio::transport::mmio::MmioDevice;
use devices::virtio::types::model::{ConfigSource, Model};
use devices::virtio::types::table::DeviceType;
use devices::virtio::{DeviceHandle, OnLoss, Parts, PhaseReport};
use fuzz::descriptors::{guest_memory, none_left};
use fuzz::driver::{PLACE, all_of_its_page, step, true_to_its_page};
use fuzz::input::Input;
use fuzz::ports::Recorder;
use fuzz::seeds::offer;
use libfuzzer_sys::fuzz_target;
use transport::memory::MemoryMap;
use transport::vhost_user::{DeviceFeatures, InflightArea, IovaMap, LiveSession, RingBase, Session};

/// A backend that works until its input says otherwise, and checks how it is used.
struct Shaky {
    fate: Arc<Mutex<Input>>,
    running: bool,
    gone: bool,
    /// Where the queues began that run.
    bases: Vec<RingBase>,
    /// Where they stand: they have to go on there.
    stood: Option<Vec<RingBase>>,
}

/// Where a packed ring begins.
const PACKED: RingBase = RingBase(1 << 31 | 1 << 15);

impl Shaky {
    fn new(fate: &Arc<Mutex<Input>>) -> Box<Self> {
        Box::new(Self { fate: Arc::clone(fate), running: false, gone: false, bases: Vec::new(), stood: None })
    }

    fn fate(&self) -> Result<(), BackendError> {
        assert!(!self.gone, "a backend that was given up is asked for something");
        match self.fate.lock().expect("no panic").byte() {
            0..232 => Ok(()),
            232..244 => Err(BackendError::Refused("no".into())),
            _ => Err(BackendError::Lost("gone".into())),
        }
    }
}

impl Backend for Shaky {
    fn start(&mut self, start: &Start<'_>) -> Result<Option<Arc<InflightArea>>, BackendError> {
        assert!(!self.running, "started twice");
        for ring in start.rings {
            assert!(ring.size > 0 && ring.size <= 256);
            for at in [ring.descriptor, ring.available, ring.used] {
                assert!(start.memory.user_addr(at, 4).is_some(), "a ring outside memory");
            }
            let packed = start.features.has(34);
            let good = if packed { ring.base == PACKED } else { ring.base.0 <= 0xffff };
            assert!(good || self.stood.is_some(), "{:?}", ring.base);
        }
        self.bases = start.rings.iter().map(|ring| ring.base).collect();
        if let Some(stood) = self.stood.take() {
            assert_eq!(self.bases, stood, "queues go on where they stood");
        }
        assert!(start.inflight.is_none(), "an inflight area that no backend gave");
        self.fate()?;
        self.running = true;
        Ok(None)
    }

    fn stop(&mut self, how: Stop) -> Result<Vec<RingBase>, BackendError> {
        let ran = std::mem::replace(&mut self.running, false);
        self.fate()?;
        if how == Stop::Reset {
            self.stood = None;
            return Ok(Vec::new());
        }
        assert!(ran, "what stands is to stand");
        // Each queue has got somewhere meanwhile.
        let on = |base: &RingBase| RingBase(base.0 ^ 0x15);
        let stood: Vec<RingBase> = self.bases.iter().map(on).collect();
        self.stood = Some(stood.clone());
        Ok(stood)
    }

    fn config(&mut self, written: Option<(u32, &[u8])>) -> Result<Vec<u8>, BackendError> {
        if let Some((offset, bytes)) = written {
            assert!(offset as usize + bytes.len() <= 60);
        }
        self.fate()?;
        Ok(self.fate.lock().expect("no panic").bytes(80))
    }

    fn change_memory(&mut self, _: &MemoryMap) -> Result<MemoryChange, BackendError> {
        self.fate()?;
        Ok(MemoryChange::NeedsRestart)
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

    /// Asked where only the driver can say what was in flight. Nobody moves the rings meanwhile, so the
    /// device would wait for seconds: the backend lets it do so now and then.
    fn has_hung_up(&self) -> bool {
        self.gone || !self.fate.lock().expect("no panic").rarely(16)
    }

    fn disconnect(&mut self) {
        (self.gone, self.running) = (true, false);
    }

    fn stats(&self) -> BackendStats {
        BackendStats::default()
    }
}

fuzz_target!(init: offer(&seeds()), |data: &[u8]| {
    none_left(|| drive(data));
});

/// A driver that starts the device, is paused, restarts its machine, loses its backend, gets another one,
/// resets; with a device that recovers and one that breaks.
fn seeds() -> Vec<Vec<u8>> {
    let own = |op: u8| vec![0xff, op];
    let queue = |n: u8| [&[0xff, 3, n], [0; 7].as_slice()].concat();
    let start = [own(1), vec![0xff, 2, 0], queue(0), queue(1), own(4)].concat();
    let lost = [&[0xff, 168, 0, 0], own(7).as_slice(), &start].concat();
    let stood = [own(170), own(171), vec![32], own(172), start.clone()].concat();
    let story =
        [start.clone(), stood, own(144), vec![0xff, 96, 0, 0, 0], lost, vec![0, 0], own(172), own(173)]
            .concat();
    [0, 1].map(|recovers| [&[1, 0, 0, 0, 0, recovers], story.as_slice()].concat()).to_vec()
}

fn drive(data: &[u8]) {
    let mut input = Input::new(data);
    let queues = u16::from(input.byte() % 4) + 1;
    let refuse = input.byte();
    let machine = Recorder::refusing(if refuse < 240 { 0 } else { usize::from(refuse - 239) });
    let (kind, memory) = (input.pick(&["blk", "net"]), guest_memory());
    // The backends' part comes first, so that the driver's stays where it is.
    let fate = Arc::new(Mutex::new(Input::new(&input.bytes(48))));
    let backend = Shaky::new(&fate);
    let model = model(&mut input, kind, queues);
    let parts = Parts {
        name: "fuzz".into(),
        service: service_of(&model),
        model,
        backend,
        outlets: Outlets::default(),
        memory: memory.clone(),
    };
    let handle = DeviceHandle::new(parts).expect("eventfds");
    let Ok(mut device) = MmioDevice::new(&handle, PLACE, &machine.ports()) else {
        return assert_eq!(machine.counts(), (0, 0), "what was registered is undone");
    };
    drop(handle);
    let recovers = input.rarely(2);
    device.handle().on_loss(if recovers { OnLoss::Recover } else { OnLoss::Break });
    while !input.is_empty() {
        match input.byte() {
            0..16 => successor(&mut input, &device, kind, queues, &fate),
            16..32 => progress(&mut input, &memory),
            32..36 => drop(device.handle().change_memory(&memory)),
            _ => step(&mut input, &mut device, &machine),
        }
        true_to_its_page(&device, &machine);
    }
    all_of_its_page(&device, &machine);
    drop(device);
    assert_eq!(machine.counts(), (0, 0));
}

/// A device of `kind`, with something missing at times.
fn model(input: &mut Input, kind: &str, queues: u16) -> Model {
    let odd = input.byte();
    let features: u64 = 7 << 32 | 1 << 12 | 1 << 22 | 1 << 17;
    Model {
        device_type: DeviceType::named(kind).expect("a type"),
        features: DeviceFeatures::from_bits(if odd & 0x70 == 0x70 { 1 << 32 } else { features }),
        queues: if odd & 0xf == 0xf { 1 } else { queues },
        queue_size: 256,
        config: vec![0; 60],
        config_source: if odd & 0x80 == 0x80 { ConfigSource::Fixed } else { ConfigSource::Backend },
        shared_memory: Vec::new(),
    }
}

/// Another backend comes, wanted or not.
fn successor(input: &mut Input, device: &MmioDevice, kind: &str, queues: u16, fate: &Arc<Mutex<Input>>) {
    let waited = matches!(device.handle().phase(), PhaseReport::Recovering(_));
    let backend = Shaky::new(fate);
    let taken = device.handle().fill(Candidate { model: model(input, kind, queues), backend });
    assert!(waited || taken.is_err(), "a backend that nobody waits for is taken");
}

/// The driver and a backend move the indexes of a ring, or say that they did.
fn progress(input: &mut Input, memory: &MemoryMap) {
    let ring = u64::from(input.byte() % 4) << 16;
    let (available, used) = (input.u16(), input.u16());
    let used = if input.rarely(4) { used } else { available.wrapping_sub(used % 4) };
    let region = memory.regions().first().expect("one at least");
    for (at, index) in [(ring + 0x3002, available), (ring + 0x4002, used)] {
        rustix::io::pwrite(region.fd(), &index.to_le_bytes(), at).expect("guest memory");
    }
}
