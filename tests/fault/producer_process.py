"""A producer in a process of its own, which may be killed at any moment: `producer_process.py PLAN`.

It knows the contract (§7) and nothing else. Whoever starts it again gives it the same plan; its ledger
tells it how far it had got. It accuses the server, in the ledger, of every answer that §7 does not allow.
"""

import asyncio
import sys
from random import Random

from producer_ledger import Ledger, read_ledger
from producer_link import GoneError, MessageLink, WrongError
from producer_plan import ProducerPlan, decoded
from producer_writer import MessageWriter
from raw_http import GarbledError, HungError


async def produce(plan: ProducerPlan) -> None:
    """Until everything is written, lost or accused."""
    account = read_ledger(plan.ledger)
    ledger = Ledger(plan.ledger)
    random = Random(f"{plan.seed}:{plan.name}:{sum(account.counts.values())}")
    try:
        for message in plan.messages:
            if not account.record(message.id).is_over:
                link = MessageLink(plan, message, account, ledger, random)
                await _write(link)
    except GoneError:
        ledger.note("gone")
    except WrongError:
        return
    except (HungError, GarbledError) as error:
        ledger.fault("an answer that is none", by=plan.name, error=repr(error))
        return
    ledger.note("done")


async def _write(link: MessageLink) -> None:
    if link.plan.via == "client":
        # Only then: the bare way shares nothing with contextd.
        from producer_client import write_by_client  # noqa: PLC0415

        await write_by_client(link)
    else:
        await MessageWriter(link).run()


if __name__ == "__main__":
    asyncio.run(produce(decoded(sys.argv[1])))
