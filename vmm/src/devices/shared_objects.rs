//! The vhost-user requests `SHARED_OBJECT_ADD`, `SHARED_OBJECT_REMOVE` and `SHARED_OBJECT_LOOKUP`: a table of
//! the objects that backends offer to other backends. It holds data only; the descriptors stay with the
//! backends.

use std::collections::BTreeMap;

use transport::vhost_user::message::Uuid;

/// The limit of objects for one connection, so that no backend takes all the room.
const PER_OWNER: usize = 256;

/// One connection of a backend: the device's number, and the number of the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Owner {
    pub(crate) device: usize,
    pub(crate) connection: u64,
}

/// The objects that are offered now, and the connection that offers each.
#[derive(Debug, Default)]
pub(crate) struct SharedObjects(BTreeMap<[u8; 16], Owner>);

impl SharedObjects {
    /// Adds an object. False when the object is already offered, or `owner` has too many.
    pub(crate) fn add(&mut self, uuid: Uuid, owner: Owner) -> bool {
        let full = self.0.values().filter(|other| **other == owner).count() >= PER_OWNER;
        if full || self.0.contains_key(&uuid.bytes) {
            return false;
        }
        self.0.insert(uuid.bytes, owner);
        true
    }

    /// Removes an object that `owner` offers. False when `owner` does not offer it.
    pub(crate) fn remove(&mut self, uuid: Uuid, owner: Owner) -> bool {
        let is_theirs = self.0.get(&uuid.bytes) == Some(&owner);
        is_theirs && self.0.remove(&uuid.bytes).is_some()
    }

    /// The connection that offers an object.
    pub(crate) fn owner(&self, uuid: Uuid) -> Option<Owner> {
        self.0.get(&uuid.bytes).copied()
    }

    /// Removes every object of a connection that has ended.
    pub(crate) fn forget(&mut self, owner: Owner) {
        self.0.retain(|_, other| *other != owner);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uuid(number: u16) -> Uuid {
        let mut bytes = [0; 16];
        bytes[..2].copy_from_slice(&number.to_le_bytes());
        Uuid { bytes }
    }

    #[test]
    fn objects_belong_to_the_connection_that_offered_them() {
        let [a, b] = [0, 1].map(|device| Owner { device, connection: 7 });
        let mut objects = SharedObjects::default();
        assert!(objects.add(uuid(1), a) && objects.add(uuid(2), b));
        assert!(!objects.add(uuid(1), b) && !objects.add(uuid(1), a), "taken");
        assert!(!objects.remove(uuid(1), b) && !objects.remove(uuid(3), a), "not theirs");
        assert_eq!((objects.owner(uuid(1)), objects.owner(uuid(3))), (Some(a), None));
        let again = Owner { connection: 8, ..a };
        assert!(!objects.remove(uuid(1), again));
        objects.forget(a);
        assert_eq!((objects.owner(uuid(1)), objects.owner(uuid(2))), (None, Some(b)));
        assert!(objects.remove(uuid(2), b) && objects.add(uuid(2), again));
    }

    #[test]
    fn a_flood_of_objects_ends() {
        let owner = Owner { device: 0, connection: 0 };
        let mut objects = SharedObjects::default();
        let taken = (0..1000).filter(|number| objects.add(uuid(*number), owner)).count();
        assert_eq!(taken, PER_OWNER);
        assert!(objects.add(uuid(5000), Owner { device: 1, ..owner }), "others have room of their own");
    }
}
