use std::sync::Mutex;

use devices::bus::BusDevice;
use devices::ports::Access;
use vm_memory::{Bytes, VolatileMemory};

use super::*;
use crate::host::kvm;
use crate::host::mapping::Mapping;
use crate::host::slots::Slots;

/// Each read gives the next number.
#[derive(Default)]
struct Counter {
    reads: Mutex<Vec<(u64, usize)>>,
    writes: Mutex<Vec<(u64, Vec<u8>)>>,
}

impl BusDevice for Counter {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut reads = self.reads.lock().unwrap();
        reads.push((offset, data.len()));
        data.fill(u8::try_from(reads.len()).unwrap());
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.writes.lock().unwrap().push((offset, data.to_vec()));
    }
}

#[test]
fn a_string_instruction_is_as_many_accesses_of_the_one_port() {
    let kvm = match kvm::open() {
        Ok(kvm) => kvm,
        Err(_) => return println!("skipped: there is no KVM"),
    };
    let vm = Arc::new(kvm.create_vm().unwrap());
    let memory = Mapping::anonymous(0x1_0000).unwrap();
    let slots = Slots::new(Arc::clone(&vm), kvm::slot_limit(&kvm));
    let _slot = slots.add(0, memory.clone(), Access::ReadWrite).unwrap();
    // In real mode: four words from port 0x1000 to 0x3000, and out again at port 0x1002; then one word each.
    let code = [
        &[0xba, 0x00, 0x10, 0xbf, 0x00, 0x30, 0xb9, 0x04, 0x00, 0xfc, 0xf3, 0x6d][..],
        &[0xba, 0x02, 0x10, 0xbe, 0x00, 0x30, 0xb9, 0x04, 0x00, 0xf3, 0x6f, 0xed, 0xef, 0xf4],
    ];
    memory.region().as_volatile_slice().write_slice(&code.concat(), 0x2000).unwrap();
    let fd = vm.create_vcpu(0).unwrap();
    let mut sregs = fd.get_sregs().unwrap();
    for segment in [&mut sregs.cs, &mut sregs.ds, &mut sregs.es] {
        (segment.base, segment.selector) = (0, 0);
    }
    fd.set_sregs(&sregs).unwrap();
    fd.set_regs(&kvm_bindings::kvm_regs { rip: 0x2000, rflags: 2, ..Default::default() }).unwrap();

    let device = Arc::new(Counter::default());
    let mut pio = Bus::new();
    pio.insert(0x1000, 4, "counter", Arc::<Counter>::clone(&device)).unwrap();
    let lifecycle = Arc::new(Lifecycle::new().unwrap());
    lifecycle.open();
    let mut vcpu = Vcpu {
        fd,
        index: 0,
        pio: Arc::new(pio),
        mmio: Arc::default(),
        lifecycle,
        peer_memory: PeerMemory::new(slots).unwrap(),
        counters: Arc::default(),
        faults: 0,
        begun: Instant::now(),
    };
    // Up to its `hlt`, for which nobody waits here.
    let end = std::iter::repeat_with(|| vcpu.step()).take(50).flatten().next();
    assert!(matches!(&end, Some(Request::Crash(why)) if why.contains("Hlt")), "{end:?}");
    let (reads, writes) = (device.reads.lock().unwrap(), device.writes.lock().unwrap());
    assert_eq!(*reads, [(0, 2), (0, 2), (0, 2), (0, 2), (2, 2)]);
    let expected: Vec<_> = (1..=5).map(|n| (2, vec![n, n])).collect();
    assert_eq!(*writes, expected);
}
