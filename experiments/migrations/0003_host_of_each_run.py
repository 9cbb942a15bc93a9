import uuid

from django.db import migrations, models


def host_of_each_run(apps, schema_editor):
    """Until now an experiment's host was its runs' too."""
    experiments = apps.get_model("experiments", "Experiment")
    runs = apps.get_model("experiments", "ModelRun")
    of_it = experiments.objects.filter(pk=models.OuterRef("experiment")).values("host")
    runs.objects.update(host=models.Subquery(of_it))


def identities(apps, schema_editor):
    for host in apps.get_model("experiments", "Host").objects.all():
        host.identity = uuid.uuid4()
        host.save(update_fields=["identity"])


class Migration(migrations.Migration):

    dependencies = [("experiments", "0002_hosts")]

    operations = [
        migrations.RunPython(host_of_each_run, migrations.RunPython.noop),
        migrations.RunPython(identities, migrations.RunPython.noop),
    ]
