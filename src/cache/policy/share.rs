//! Several owners of one space: who may have the next block, and who gives one up.
//!
//! Free space goes to whoever asks first, up to his maximum. When there is none, the owner that
//! lies furthest above his *entitlement* gives way, but nobody is pushed below his minimum.
//! Entitlements are the minimum plus a part of the rest by weight, or what [`Space::set_target`]
//! says (from miss-ratio curves, see `curve::partition`). So space follows use: what one owner does
//! not use, others have until he does.

use crate::base::{Error, ErrorKind, Result};

/// Names an owner; not reused while he is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct OwnerId(pub u32);

/// What an owner was promised. Counts are in blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// Reserved.
    pub min: u64,
    pub max: u64,
    /// Part of what is not reserved, relative to other owners; at least 1.
    pub weight: u32,
}

/// Where an owner's next block comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// It was free; it is counted as his now.
    Free,
    /// This owner (perhaps himself) has to evict one and say [`Space::release`]; then claim again.
    From(OwnerId),
    /// Nobody has anything to give: he keeps nothing of this block.
    None,
}

struct Owner {
    share: Share,
    used: u64,
    target: Option<u64>,
}

/// See the module.
pub struct Space {
    total: u64,
    owners: Vec<Option<Owner>>,
}

impl Space {
    pub fn new(total_blocks: u64) -> Self {
        Self { total: total_blocks, owners: Vec::new() }
    }

    pub fn total(&self) -> u64 {
        self.total
    }

    fn iter(&self) -> impl Iterator<Item = (OwnerId, &Owner)> {
        let named = |(index, owner): (usize, &'_ Option<Owner>)| {
            owner.as_ref().map(|_| OwnerId(index as u32))
        };
        let ids = self.owners.iter().enumerate().filter_map(named);
        ids.map(|id| (id, self.owner(id)))
    }

    fn owner(&self, id: OwnerId) -> &Owner {
        self.owners[id.0 as usize].as_ref().expect("the owner is there")
    }

    fn owner_mut(&mut self, id: OwnerId) -> &mut Owner {
        self.owners[id.0 as usize].as_mut().expect("the owner is there")
    }

    fn reserved(&self) -> u64 {
        self.iter().map(|(_, owner)| owner.share.min).sum()
    }

    /// Adds an owner.
    ///
    /// # Errors
    /// [`ErrorKind::Full`]: his minimum cannot be kept free beside the others'.
    /// [`ErrorKind::Invalid`]: the minimum is above the maximum, or the weight is zero.
    pub fn add(&mut self, share: Share) -> Result<OwnerId> {
        self.check(share, 0)?;
        let owner = Some(Owner { share, used: 0, target: None });
        let vacant = self.owners.iter().position(Option::is_none);
        let index = vacant.unwrap_or_else(|| {
            self.owners.push(None);
            self.owners.len() - 1
        });
        self.owners[index] = owner;
        Ok(OwnerId(index as u32))
    }

    /// Changes what an owner was promised; more than a new maximum is taken back by claims of
    /// [`Space::surplus`].
    ///
    /// # Errors
    /// As [`Space::add`]; nothing has changed then.
    pub fn set_share(&mut self, id: OwnerId, share: Share) -> Result<()> {
        self.check(share, self.owner(id).share.min)?;
        self.owner_mut(id).share = share;
        Ok(())
    }

    fn check(&self, share: Share, given_back: u64) -> Result<()> {
        if share.min > share.max || share.weight == 0 {
            let text = format!(
                "a minimum of {} blocks, a maximum of {} and a weight of {}: the minimum must not \
                 be above the maximum, nor the weight zero",
                share.min, share.max, share.weight
            );
            return Err(Error::new(ErrorKind::Invalid, text));
        }
        let left = self.total.saturating_sub(self.reserved() - given_back);
        if share.min > left {
            let text = format!(
                "a minimum of {} blocks where {left} of {} are not reserved: lower a minimum or \
                 enlarge the cache",
                share.min, self.total
            );
            return Err(Error::new(ErrorKind::Full, text));
        }
        Ok(())
    }

    /// The owner is gone, and so is all he had.
    pub fn remove(&mut self, id: OwnerId) {
        self.owners[id.0 as usize] = None;
    }

    /// Changes the size of the space.
    ///
    /// # Errors
    /// [`ErrorKind::Full`]: less than what is reserved.
    pub fn resize(&mut self, total_blocks: u64) -> Result<()> {
        let reserved = self.reserved();
        if total_blocks < reserved {
            let text = format!("{reserved} blocks are reserved by minimums; lower them first");
            return Err(Error::new(ErrorKind::Full, text));
        }
        self.total = total_blocks;
        Ok(())
    }

    /// What the owner should have, instead of a part by weight; `None` for that again.
    pub fn set_target(&mut self, id: OwnerId, blocks: Option<u64>) {
        self.owner_mut(id).target = blocks;
    }

    pub fn used(&self, id: OwnerId) -> u64 {
        self.owner(id).used
    }

    pub fn free(&self) -> u64 {
        self.total.saturating_sub(self.iter().map(|(_, owner)| owner.used).sum())
    }

    /// What the owner would have if everybody wanted all they can get.
    pub fn entitlement(&self, id: OwnerId) -> u64 {
        let owner = self.owner(id);
        let Share { min, max, weight } = owner.share;
        let weights: u64 = self.iter().map(|(_, other)| u64::from(other.share.weight)).sum();
        let rest = u128::from(self.total - self.reserved().min(self.total));
        let part = rest * u128::from(weight) / u128::from(weights.max(1));
        owner.target.unwrap_or(min + part as u64).clamp(min, max)
    }

    /// Where the next block of `id` comes from. Free space that others' minimums still want is
    /// lent: they get it back from the one furthest above his entitlement.
    pub fn claim(&mut self, id: OwnerId) -> Claim {
        let (used, max) = (self.owner(id).used, self.owner(id).share.max);
        if used >= max {
            return if used > 0 { Claim::From(id) } else { Claim::None };
        }
        if self.free() > 0 {
            self.owner_mut(id).used += 1;
            return Claim::Free;
        }
        self.giver(Some(id)).map_or(Claim::None, Claim::From)
    }

    /// Who has more than he may: after the space or a maximum shrank, evict one of his blocks and
    /// ask again.
    pub fn surplus(&self) -> Option<OwnerId> {
        let above = self.iter().find(|(_, owner)| owner.used > owner.share.max);
        let used: u64 = self.iter().map(|(_, owner)| owner.used).sum();
        above.map(|(id, _)| id).or_else(|| (used > self.total).then(|| self.giver(None)).flatten())
    }

    /// The owner furthest above his entitlement, in shares of it; the one who asks in doubt. An
    /// owner at his minimum gives only if he is the one who asks.
    fn giver(&self, asks: Option<OwnerId>) -> Option<OwnerId> {
        let mut best: Option<(OwnerId, f64)> = None;
        for (id, owner) in self.iter() {
            let own = asks == Some(id);
            if owner.used == 0 || (owner.used <= owner.share.min && !own) {
                continue;
            }
            let excess = owner.used as f64 / self.entitlement(id).max(1) as f64;
            if best.is_none_or(|(_, most)| excess > most || (own && excess >= most)) {
                best = Some((id, excess));
            }
        }
        // Who is below his minimum never pays with his own block while another lends.
        let lends = |&(id, owner): &(OwnerId, &Owner)| {
            asks != Some(id) && owner.used > owner.share.min && owner.used > self.entitlement(id)
        };
        let asker = asks.map(|id| self.owner(id));
        if asker.is_some_and(|owner| owner.used < owner.share.min) && best.map(|b| b.0) == asks {
            let excess = |&(id, owner): &(OwnerId, &Owner)| owner.used - self.entitlement(id);
            let other = self.iter().filter(lends).max_by_key(excess);
            return other.map(|(id, _)| id).or(asks);
        }
        best.map(|(id, _)| id)
    }

    /// One block of `id` was evicted or forgotten.
    pub fn release(&mut self, id: OwnerId) {
        let owner = self.owner_mut(id);
        assert!(owner.used > 0, "an owner gives back what he has");
        owner.used -= 1;
    }
}

#[cfg(test)]
#[path = "share_test.rs"]
mod tests;
