use std::thread::sleep;
use std::time::Duration;

use devices::bus::BusDevice;
use devices::ports::Access;
use vm_memory::{Bytes, VolatileMemory};

use super::*;
use crate::host::kvm;
use crate::host::mapping::Mapping;
use crate::host::slots::Slots;

/// Fills each read with the number of reads so far.
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

/// A VM with 64 KiB of memory. Its code is at 0x2000 and runs in real mode.
struct Bench {
    vm: Arc<kvm_ioctls::VmFd>,
    slots: Arc<Slots>,
    memory: Mapping,
    _slot: crate::host::slots::Slot,
    lifecycle: Arc<Lifecycle>,
}

impl Bench {
    fn new(kvm: &kvm_ioctls::Kvm, code: &[u8]) -> Self {
        let vm = Arc::new(kvm.create_vm().unwrap());
        vm.create_irq_chip().unwrap();
        let memory = Mapping::anonymous(0x1_0000).unwrap();
        let slots = Slots::new(Arc::clone(&vm), kvm::slot_limit(kvm));
        let slot = slots.add(0, memory.clone(), Access::ReadWrite).unwrap();
        memory.region().as_volatile_slice().write_slice(code, 0x2000).unwrap();
        Self { vm, slots, memory, _slot: slot, lifecycle: Arc::new(Lifecycle::new().unwrap()) }
    }

    fn vcpu(&self, index: u8) -> VcpuFd {
        let fd = self.vm.create_vcpu(u64::from(index)).unwrap();
        let mut sregs = fd.get_sregs().unwrap();
        for segment in [&mut sregs.cs, &mut sregs.ds, &mut sregs.es] {
            (segment.base, segment.selector) = (0, 0);
        }
        fd.set_sregs(&sregs).unwrap();
        fd.set_mp_state(kvm_bindings::kvm_mp_state { mp_state: kvm_bindings::KVM_MP_STATE_RUNNABLE })
            .unwrap();
        fd.set_regs(&kvm_bindings::kvm_regs { rip: 0x2000, rflags: 2, ..Default::default() }).unwrap();
        fd
    }

    fn thread(&self, index: u8, fd: &Arc<Mutex<VcpuFd>>, pio: &Arc<Bus>) -> Vcpu {
        Vcpu {
            fd: Arc::clone(fd),
            index,
            pio: Arc::clone(pio),
            mmio: Arc::default(),
            lifecycle: Arc::clone(&self.lifecycle),
            peer_memory: PeerMemory::new(Arc::clone(&self.slots)).unwrap(),
            counters: Arc::default(),
            faults: 0,
            begun: Instant::now(),
        }
    }
}

/// A device that takes 300 µs for each read, as a slow peer does. Fills each read with the number of reads so
/// far.
#[derive(Default)]
struct Slow(Mutex<u16>);

impl BusDevice for Slow {
    fn read(&self, _: u64, data: &mut [u8]) {
        sleep(Duration::from_micros(300));
        let mut last = self.0.lock().unwrap();
        *last = last.wrapping_add(1);
        data.copy_from_slice(&last.to_le_bytes());
    }

    fn write(&self, _: u64, _: &[u8]) {}
}

#[test]
fn vcpus_park_out_of_a_loop_a_halt_and_an_exchange_with_nothing_pending() {
    let Ok(kvm) = kvm::open() else { return println!("skipped: there is no KVM") };
    // The first spins; the second halts; the third reads port 0x1000 again and again.
    let bench = Bench::new(&kvm, &[]);
    for (at, code) in [
        (0x2000, &[0xff, 0x06, 0x00, 0x30, 0xeb, 0xfa][..]),
        (0x2100, &[0xf4, 0xeb, 0xfd]),
        (0x2200, &[0xba, 0x00, 0x10, 0xed, 0xeb, 0xfd]),
    ] {
        bench.memory.region().as_volatile_slice().write_slice(code, at).unwrap();
    }
    let fds: Vec<_> = (0..3).map(|index| bench.vcpu(index)).collect();
    for (fd, rip) in fds.iter().zip([0x2000, 0x2100, 0x2200]) {
        fd.set_regs(&kvm_bindings::kvm_regs { rip, rflags: 2, ..Default::default() }).unwrap();
    }
    let slow = Arc::new(Slow::default());
    let mut pio = Bus::new();
    pio.insert(0x1000, 2, "slow", Arc::<Slow>::clone(&slow)).unwrap();
    let pio = Arc::new(pio);
    let mut vcpus = Vcpus::new(Arc::clone(&bench.lifecycle), fds);
    for (index, fd) in (0..).zip(vcpus.fds().to_vec()) {
        vcpus.start(bench.thread(index, &fd, &pio)).unwrap();
    }
    let counted = || bench.memory.region().as_volatile_slice().read_obj::<u16>(0x3000).unwrap();
    bench.lifecycle.open();
    let rounds: u16 = 1000;
    let mut reads = 0;
    for round in 0..rounds {
        let parked = vcpus.park(|| {});
        let (count, last) = (counted(), *slow.0.lock().unwrap());
        let mut seen = Vec::new();
        parked.each(|fd| seen.push(fd.get_regs().unwrap()));
        assert_eq!(seen.len(), 3);
        assert_eq!(seen[2].rax & 0xffff, u64::from(last), "round {round}: the read is completed");
        if round % 100 == 0 {
            sleep(Duration::from_millis(3));
        }
        assert_eq!((counted(), *slow.0.lock().unwrap()), (count, last), "nothing moves");
        reads = last;
        drop(parked);
        if round % 10 == 0 {
            sleep(Duration::from_millis(1));
        }
    }
    assert!(counted() > 0 && reads > 10, "the guest went on in between ({} {reads})", counted());
    vcpus.end(|| {});
}

#[test]
fn a_string_instruction_is_as_many_accesses_of_the_one_port() {
    let kvm = match kvm::open() {
        Ok(kvm) => kvm,
        Err(_) => return println!("skipped: there is no KVM"),
    };
    // In real mode: four words from port 0x1000 to 0x3000, and out again at port 0x1002; then one word each.
    let code = [
        &[0xba, 0x00, 0x10, 0xbf, 0x00, 0x30, 0xb9, 0x04, 0x00, 0xfc, 0xf3, 0x6d][..],
        &[0xba, 0x02, 0x10, 0xbe, 0x00, 0x30, 0xb9, 0x04, 0x00, 0xf3, 0x6f, 0xed, 0xef, 0xf4],
    ];
    let bench = Bench::new(&kvm, &code.concat());
    let device = Arc::new(Counter::default());
    let mut pio = Bus::new();
    pio.insert(0x1000, 4, "counter", Arc::<Counter>::clone(&device)).unwrap();
    bench.lifecycle.open();
    let fd = Arc::new(Mutex::new(bench.vcpu(0)));
    let mut vcpu = bench.thread(0, &fd, &Arc::new(pio));
    let mut fd = fd.lock().unwrap();
    for _ in 0..50 {
        if device.writes.lock().unwrap().len() < 5 {
            assert_eq!(vcpu.step(&mut fd), Step::Answered);
        }
    }
    let (reads, writes) = (device.reads.lock().unwrap(), device.writes.lock().unwrap());
    assert_eq!(*reads, [(0, 2), (0, 2), (0, 2), (0, 2), (2, 2)]);
    let expected: Vec<_> = (1..=5).map(|n| (2, vec![n, n])).collect();
    assert_eq!(*writes, expected);
}
