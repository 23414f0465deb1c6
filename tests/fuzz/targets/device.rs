//! A whole vhost-user device: a driver that does what it likes on one side, a backend that says what it
//! likes on the other.
#![no_main]

use devices::virtio::backend::vhost_user::Order;
use devices::virtio::recovery::candidate::open;
use devices::virtio::served::service_of;
use devices::virtio::transport::mmio::MmioDevice;
use devices::virtio::types::model::Wishes;
use devices::virtio::types::table::DeviceType;
use devices::virtio::{DeviceHandle, OnLoss, Parts, PhaseReport};
use fuzz::descriptors::{guest_memory, none_left};
use fuzz::driver::{PLACE, all_of_its_page, step, true_to_its_page};
use fuzz::input::Input;
use fuzz::peer::Peer;
use fuzz::ports::Recorder;
use fuzz::seeds::offer;
use libfuzzer_sys::fuzz_target;

fuzz_target!(init: offer(&seeds()), |data: &[u8]| {
    none_left(|| drive(data));
});

/// A driver that starts the device, loses its backend, starts again; of each type.
fn seeds() -> Vec<Vec<u8>> {
    let start = [1, 2, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 4];
    let driver = [&[1], start.as_slice(), &[144, 112, 0, 0, 7], &start, &[168, 6, 3, 7], &start].concat();
    let length = u8::try_from(driver.len()).expect("short");
    (0..8).map(|kind| [&[kind, 0, 0, length], driver.as_slice(), &[0; 64]].concat()).collect()
}

fn drive(data: &[u8]) {
    let mut input = Input::new(data);
    let kind = input.pick(&["blk", "net", "fs", "rng", "console", "vsock", "scsi", "generic:42"]);
    let wishes = Wishes {
        queues: input.rarely(8).then(|| u16::from(input.byte())),
        queue_size: input.rarely(8).then(|| 1 << (input.byte() % 16)),
    };
    let Ok(device_type) = kind.parse::<DeviceType>() else { return };
    let Ok(order) = Order::new(device_type, wishes, "") else { return };
    let mut driver = Input::new(&input.bytes(255));
    let (_peer, connection) = Peer::new(Input::new(&input.bytes(400)));
    let opened = match open(connection, &order) {
        Ok(opened) => opened,
        Err(error) => return drop((error.to_string(), error.hint())),
    };
    assert!((1..=256).contains(&opened.model.queues) && opened.model.config.len() <= 256);
    let machine = Recorder::default();
    let parts = Parts {
        name: "fuzz".into(),
        service: service_of(&opened.model),
        model: opened.model,
        backend: Box::new(opened.backend),
        outlets: opened.outlets,
        memory: guest_memory(),
    };
    let handle = DeviceHandle::new(parts).expect("eventfds");
    let mut device =
        MmioDevice::new(&handle, PLACE, &machine.ports()).expect("a machine that refuses nothing");
    drop(handle);
    let recovers = driver.rarely(2);
    device.handle().on_loss(if recovers { OnLoss::Recover } else { OnLoss::Break });
    let mut peers = Vec::new();
    while !driver.is_empty() {
        step(&mut driver, &mut device, &machine);
        if matches!(device.handle().phase(), PhaseReport::Recovering(_)) && peers.len() < 4 {
            // The next one plays the next part of the input.
            let (peer, connection) = Peer::new(Input::new(&input.bytes(400)));
            peers.push(peer);
            if let Err(error) = opened.reconnect.attempt(&device.handle(), connection, |_channel| {}) {
                let _ = (error.to_string(), error.is_final());
            }
        }
        true_to_its_page(&device, &machine);
    }
    all_of_its_page(&device, &machine);
    drop(device);
    assert_eq!(machine.counts(), (0, 0));
}
