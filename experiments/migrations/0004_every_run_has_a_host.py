import django.db.models.deletion
from django.db import migrations, models


class Migration(migrations.Migration):

    dependencies = [("experiments", "0003_host_of_each_run")]

    operations = [
        # By itself: PostgreSQL alters no table in the transaction that has just changed its rows.
        migrations.AlterField(
            model_name="modelrun",
            name="host",
            field=models.ForeignKey(on_delete=django.db.models.deletion.RESTRICT, related_name="runs", to="experiments.host"),
        ),
    ]
